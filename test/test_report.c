/* `rlhf report` (section REPORT): what it gathers from run directories, what it refuses, when it
 * warns, and that no text of a run becomes a tag of the page. With it what runs write for it: the
 * best of n, repetition. How the page looks and behaves is test/pages_report.py's. */

#define RLHF_MAIN
#define main rlhf_main
#include "../rlhf.c"
#undef main
#include "test.h"

/* ---- run directories ------------------------------------------------------------------------- */

static const char *const run_json =
    "{\"trainer\": \"ppo\", \"kl_coef\": 0.2, \"seed\": 42, \"kl_estimator\": \"k3\", "
    "\"whiten_advantages\": false, \"gamma\": 1, \"output_dir\": \"somewhere\", \"dtype\": "
    "\"f32\", \"model\": \"it's/sft\", \"data\": \"prompts.jsonl\"}";

static const char *const metrics_jsonl =
    "{\"step\": 2, \"loss\": 1.5, \"objective/scores\": 0.125}\n"
    "{\"step\": 4, \"loss\": null, \"eval_loss\": 0.5}\n"
    "{\"step\": 5, \"loss\": 0.75}\n";

/* A file of a run directory in the test's own. */
static void put(const char *dir, const char *name, const char *text) {
    char path[256];
    mkdir(test_path(dir), 0777);
    snprintf(path, sizeof path, "%s/%s", dir, name);
    test_write(path, text);
}

static const char *run_dir(const char *dir) {
    put(dir, "run.json", run_json);
    put(dir, "metrics.jsonl", metrics_jsonl);
    return test_path(dir);
}

/* One call of the section, its answer kept beyond the call. */
typedef struct ask {
    const char *dirs[4];
    int n;
    const char *raters, *out;
    json_t *data;
    int warnings;
} ask;

static void collect(rlhf_ctx *ctx, void *arg) {
    ask *a = arg;
    a->data = report_collect(ctx, a->dirs, a->n, a->raters);
    err_keep(ctx);
}

static void write_page(rlhf_ctx *ctx, void *arg) {
    ask *a = arg;
    report_write(ctx, a->dirs, a->n, a->raters, a->out, &a->warnings);
}

/* A value deep in an object, its path separated by '|', since metrics' names have slashes; numbers
 * are indices. */
static json_t *at(json_t *j, const char *path) {
    char copy[256];
    snprintf(copy, sizeof copy, "%s", path);
    for (char *part = strtok(copy, "|"); part && j; part = strtok(NULL, "|"))
        j = json_is_array(j) ? json_array_get(j, (size_t)atoi(part)) : json_object_get(j, part);
    return j;
}

#define NUMBER(j, path) json_number_value(at(j, path))
#define STRING(j, path) json_string_value(at(j, path))

static char *slurp(const char *path) {
    FILE *f = fopen(path, "rb");
    char *text = calloc(1, 1 << 20);
    if (f && text) text[fread(text, 1, (1 << 20) - 1, f)] = 0;
    if (f) fclose(f);
    return text;
}

/* ---- what is gathered ------------------------------------------------------------------------ */

TEST(points_in_order) {
    rlhf_ctx *ctx = test_context("auto", 1);
    ask a = {.dirs = {run_dir("one")}, .n = 1};
    OK(ctx, test_call(ctx, collect, &a));
    REQUIRE(a.data);
    json_t *loss = at(a.data, "runs|0|metrics|loss");
    CHECK_EQ_I(json_array_size(at(loss, "step")), 3);
    CHECK_EQ_I(json_array_size(at(loss, "value")), 3);
    static const int steps[] = {2, 4, 5};
    for (int i = 0; i < 3; i++)
        CHECK_EQ_I(json_integer_value(json_array_get(at(loss, "step"), (size_t)i)), steps[i]);
    CHECK_NEAR(NUMBER(loss, "value|0"), 1.5, 0);
    CHECK(json_is_null(at(loss, "value|1")));
    CHECK_NEAR(NUMBER(loss, "value|2"), 0.75, 0);
    /* A metric that not every line has keeps its own steps. */
    CHECK_EQ_I(json_array_size(at(a.data, "runs|0|metrics|eval_loss|step")), 1);
    CHECK_NEAR(NUMBER(a.data, "runs|0|metrics|eval_loss|step|0"), 4, 0);
    CHECK(!at(a.data, "runs|0|metrics|step"));
    CHECK(json_is_null(at(a.data, "runs|0|eval")) && json_is_null(at(a.data, "runs|0|best_of_n")));
    CHECK_EQ_I(json_array_size(at(a.data, "runs|0|samples")), 0);
    CHECK_EQ_I(json_array_size(at(a.data, "runs|0|unchecked")), 3); /* one line of scores */
    CHECK(json_is_null(at(a.data, "raters")));
    json_decref(a.data);
    rlhf_close(ctx);
}

TEST(what_was_run) {
    rlhf_ctx *ctx = test_context("auto", 1);
    run_dir("one");
    char dir[600], expected[1200];
    snprintf(dir, sizeof dir, "%s/", test_path("one"));
    ask a = {.dirs = {dir}, .n = 1};
    OK(ctx, test_call(ctx, collect, &a));
    REQUIRE(a.data);
    /* Inputs first, then what differs from the defaults; not the seed, not gamma, which are 42 and
     * 1 anyway, and not the directory it once had. */
    snprintf(expected, sizeof expected,
             "rlhf ppo --model 'it'\\''s/sft' --data prompts.jsonl --kl_coef 0.2 --kl_estimator k3 "
             "--whiten_advantages false --out %s",
             dir);
    CHECK_EQ_S(STRING(a.data, "runs|0|command"), expected);
    CHECK_EQ_I(json_array_size(at(a.data, "runs|0|options")), 5);
    CHECK_EQ_S(STRING(a.data, "runs|0|options|2|name"), "kl_coef");
    CHECK_NEAR(NUMBER(a.data, "runs|0|options|2|value"), 0.2, 0);
    CHECK_NEAR(NUMBER(a.data, "runs|0|options|2|default"), 0.05, 0);
    CHECK(json_is_true(at(a.data, "runs|0|options|4|default")));
    CHECK_EQ_S(STRING(a.data, "runs|0|name"), "one");
    json_decref(a.data);
    rlhf_close(ctx);
}

TEST(names_of_runs) {
    rlhf_ctx *ctx = test_context("auto", 1);
    char dirs[3][600];
    const char *const names[] = {"a/run", "b/run", "b/other"};
    mkdir(test_path("a"), 0777);
    mkdir(test_path("b"), 0777);
    ask a = {.n = 3};
    for (int i = 0; i < 3; i++) {
        snprintf(dirs[i], sizeof dirs[i], "%s", run_dir(names[i]));
        a.dirs[i] = dirs[i];
    }
    OK(ctx, test_call(ctx, collect, &a));
    REQUIRE(a.data);
    CHECK_EQ_S(STRING(a.data, "runs|0|name"), dirs[0]);
    CHECK_EQ_S(STRING(a.data, "runs|1|name"), dirs[1]);
    CHECK_EQ_S(STRING(a.data, "runs|2|name"), "other");
    json_decref(a.data);
    rlhf_close(ctx);
}

/* A run that is still writing: the half of a line is no error and no point. */
TEST(line_cut_short) {
    rlhf_ctx *ctx = test_context("auto", 1);
    run_dir("one");
    put("one", "metrics.jsonl", "{\"step\": 1, \"loss\": 2}\n{\"step\": 2, \"lo");
    ask a = {.dirs = {test_path("one")}, .n = 1};
    OK(ctx, test_call(ctx, collect, &a));
    REQUIRE(a.data);
    CHECK_EQ_I(json_array_size(at(a.data, "runs|0|metrics|loss|step")), 1);
    json_decref(a.data);
    /* A whole line without its end counts. */
    put("one", "metrics.jsonl", "{\"step\": 1, \"loss\": 2}\n{\"step\": 2, \"loss\": 1}");
    OK(ctx, test_call(ctx, collect, &a));
    CHECK_EQ_I(json_array_size(at(a.data, "runs|0|metrics|loss|step")), 2);
    json_decref(a.data);
    rlhf_close(ctx);
}

/* ---- what is refused ------------------------------------------------------------------------- */

TEST(errors) {
    static const struct {
        const char *file, *text, *expected;
    } cases[] = {
        {"run.json", NULL, "one: not a run directory: there is no run.json in it"},
        {"run.json", "{\n\n!", "one/run.json:3: bad JSON"},
        {"run.json", "[]", "one/run.json: expected an object"},
        {"run.json", "{\"trainer\": \"dpo\"}", "\"trainer\": found \"dpo\", expected sft, rm or"},
        {"run.json", "{}", "one/run.json: missing \"trainer\""},
        {"metrics.jsonl", NULL, "one/metrics.jsonl: cannot read: No such file"},
        {"metrics.jsonl", "{\"step\": 1}\n{\"step\" 2}\n{\"step\": 3}\n",
         "one/metrics.jsonl:2: bad JSON"},
        {"metrics.jsonl", "{\"step\": 1}\n\n", "one/metrics.jsonl:2: bad JSON"},
        {"metrics.jsonl", "{\"step\": 1}\n7\n", "one/metrics.jsonl:2: key \"line\": found 7"},
        {"metrics.jsonl", "{\"loss\": 1}\n", "one/metrics.jsonl:1: missing \"step\""},
        {"metrics.jsonl", "{\"step\": 1, \"loss\": \"low\"}\n",
         "one/metrics.jsonl:1: key \"loss\": found \"low\", expected a number or null"},
        {"metrics.jsonl", "{\"step\": 3, \"loss\": 1}\n{\"step\": 3, \"loss\": 1}\n",
         "one/metrics.jsonl:2: key \"step\": found 3, expected more than in the lines before"},
        {"samples.jsonl", "{\"step\": 0, \"prompt\": \"a\"}\n",
         "one/samples.jsonl:1: missing \"completion\""},
        {"samples.jsonl", "{\"step\": 0, \"prompt\": 1, \"completion\": \"b\"}\n",
         "one/samples.jsonl:1: key \"prompt\": found 1, expected a string"},
        {"best_of_n.json", "{\"points\": [{\"n\": 1, \"kl\": 0, \"score\": \"x\"}]}",
         "one/best_of_n.json: key \"score\""},
        {"best_of_n.json", "{}", "one/best_of_n.json: missing \"points\""},
        {"eval.json", "[1]", "one/eval.json: expected an object"},
    };
    rlhf_ctx *ctx = test_context("auto", 1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        test_remove(test_path("one"));
        run_dir("one");
        char name[64];
        snprintf(name, sizeof name, "one/%s", cases[i].file);
        if (cases[i].text) put("one", cases[i].file, cases[i].text);
        else unlink(test_path(name));
        const char *out = test_write("page.html", "as it was");
        ask a = {.dirs = {test_path("one")}, .n = 1, .out = out};
        CHECK(test_call(ctx, write_page, &a) != RLHF_OK);
        if (!strstr(rlhf_error(ctx), cases[i].expected))
            test_fail(__FILE__, __LINE__, "\"%s\" is not in \"%s\"", cases[i].expected,
                      rlhf_error(ctx));
        char *page = slurp(test_path("page.html"));
        CHECK_EQ_S(page, "as it was");
        free(page);
    }
    test_remove(test_path("one"));
    run_dir("one");
    char raters[512];
    snprintf(raters, sizeof raters, "%s", test_write("raters.json", "{\"pairs\": 3}"));
    ask a = {.dirs = {test_path("one")}, .n = 1, .raters = raters};
    CHECK(test_call(ctx, collect, &a) != RLHF_OK);
    CHECK(strstr(rlhf_error(ctx), "raters.json: missing \"annotator\"") != NULL);
    a.raters = "no-such-file";
    CHECK(test_call(ctx, collect, &a) != RLHF_OK);
    CHECK(strstr(rlhf_error(ctx), "no-such-file: cannot read") != NULL);
    rlhf_close(ctx);
}

/* ---- the page -------------------------------------------------------------------------------- */

static int count(const char *text, const char *part) {
    int n = 0;
    for (const char *p = text; (p = strstr(p, part)); p++) n++;
    return n;
}

/* Texts that would end the script or begin another stay inside the data, and come back as they
 * were. */
TEST(texts_stay_texts) {
    static const char *const evil = "</script><script>alert(1)</script><!-- <b>&amp;\\u2028";
    rlhf_ctx *ctx = test_context("auto", 1);
    char line[512];
    run_dir("clean");
    run_dir("evil");
    snprintf(line, sizeof line, "{\"step\": 0, \"prompt\": \"%s\", \"completion\": \"%s\"}\n", evil,
             evil);
    put("evil", "samples.jsonl", line);
    snprintf(line, sizeof line, "{\"pairs\": 1, \"domain\": {\"%s\": {\"pairs\": 1}}}", evil);
    put("evil", "eval.json", line);
    char out[2][600];
    for (int k = 0; k < 2; k++) {
        snprintf(out[k], sizeof out[k], "%s", test_path(k ? "evil.html" : "clean.html"));
        ask a = {.dirs = {test_path(k ? "evil" : "clean")}, .n = 1, .out = out[k]};
        OK(ctx, test_call(ctx, write_page, &a));
    }
    char *clean = slurp(out[0]), *page = slurp(out[1]);
    CHECK_EQ_I(count(page, "<script"), count(clean, "<script"));
    CHECK_EQ_I(count(page, "</script"), count(clean, "</script"));
    CHECK_EQ_I(count(page, "<!--"), count(clean, "<!--"));
    CHECK_EQ_I(count(page, "{{"), 0);
    CHECK_EQ_I(count(page, "</style>"), 1);
    CHECK(strstr(page, "https://") == NULL);
    const char *from = strstr(page, "id=\"data\">");
    REQUIRE(from);
    from += strlen("id=\"data\">");
    json_t *j = json_loadb(from, (size_t)(strchr(from, '<') - from), 0, NULL);
    CHECK(j != NULL);
    const char *back = STRING(j, "runs|0|samples|0|completion");
    CHECK_EQ_S(back, "</script><script>alert(1)</script><!-- <b>&amp;\xe2\x80\xa8");
    json_decref(j);
    free(clean);
    free(page);
    rlhf_close(ctx);
}

TEST(every_file_is_in_the_program) {
    static const char *const names[] = {"report.html", "report.css", "report.js"};
    for (int i = 0; i < 3; i++) {
        size_t size;
        char path[64];
        const char *text = page_text(names[i], &size);
        snprintf(path, sizeof path, "data/page/%s", names[i]);
        char *file = slurp(path);
        CHECK_EQ_I(size, strlen(file));
        CHECK(memcmp(text, file, size) == 0 && text[size] == 0);
        free(file);
    }
}

TEST(out_of_memory) {
    run_dir("one");
    put("one", "samples.jsonl", "{\"step\": 0, \"prompt\": \"a\", \"completion\": \"b\"}\n");
    for (int64_t n = 0; test_next_oom(&n);) {
        int64_t call = n;
        test_fail_at(0);
        rlhf_ctx *ctx = test_context("auto", 1);
        char out[600], dir[600];
        snprintf(out, sizeof out, "%s", test_path("page.html"));
        snprintf(dir, sizeof dir, "%s", test_path("one"));
        unlink(out);
        ask a = {.dirs = {dir}, .n = 1, .out = out};
        test_fail_at(call);
        rlhf_status status = test_call(ctx, write_page, &a);
        CHECK(status == RLHF_OK || status == RLHF_ERR_MEMORY);
        /* The page is there whole or not at all. */
        char *page = slurp(out);
        CHECK(status != RLHF_OK || *page);
        CHECK(!*page || strcmp(page + strlen(page) - 8, "</html>\n") == 0);
        free(page);
        rlhf_close(ctx);
    }
}

/* ---- warnings -------------------------------------------------------------------------------- */

/* Metrics of n lines that go from a to b, with a saw of this height. */
static json_t *line_of(int n, double a, double b, double saw) {
    json_t *j = json_pack("{s:[],s:[]}", "step", "value");
    for (int i = 0; i < n; i++) {
        json_array_append_new(json_object_get(j, "step"), json_integer(i + 1));
        json_array_append_new(json_object_get(j, "value"),
                              json_real(a + (b - a) * i / (n - 1) + (i % 2 ? saw : -saw)));
    }
    return j;
}

static void judge(rlhf_ctx *ctx, void *run) {
    report_put_warnings(ctx, run);
}

TEST(warnings) {
    static const struct {
        const char *metric;
        double reward[3], metric_values[3]; /* from, to, saw */
        int lines, warned;
    } cases[] = {
        {"completions/mean_length", {0, 1, 0.01}, {10, 14, 0.1}, 50, 1},
        {"completions/mean_length", {0, 1, 0.01}, {10, 7, 0.1}, 50, 1},  /* shorter, too */
        {"completions/mean_length", {0, 1, 0.01}, {10, 11.5, 0.1}, 50, 0}, /* by less than 20 % */
        {"completions/mean_length", {1, 0, 0.01}, {10, 14, 0.1}, 50, 0}, /* the reward falls */
        {"completions/mean_length", {0, 0, 0.01}, {10, 14, 0.1}, 50, 0}, /* it stays */
        {"completions/mean_length", {0, 1, 0.01}, {10, 14, 10}, 50, 0},  /* length is noise */
        {"completions/mean_length", {0, 0.1, 2}, {10, 14, 0.1}, 50, 0},  /* the reward is */
        {"completions/mean_length", {0, 1, 0.01}, {10, 14, 0.1}, 9, 0},  /* too few to tell */
        {"completions/mean_length", {0, 1, 0.01}, {10, 14, 0.1}, 10, 1},
        {"completions/repetition", {0, 1, 0.01}, {0.1, 0.2, 0.001}, 50, 1},
        {"completions/repetition", {0, 1, 0.01}, {0.1, 0.13, 0.001}, 50, 0},
        {"completions/repetition", {0, 1, 0.01}, {0.3, 0.1, 0.001}, 50, 0}, /* falls */
        {"completions/clipped_ratio", {0, 1, 0.01}, {0, 0.3, 0.001}, 50, 1},
        {"completions/clipped_ratio", {0, 1, 0.01}, {0.3, 0, 0.001}, 50, 0},
    };
    rlhf_ctx *ctx = test_context("auto", 1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const double *r = cases[i].reward, *m = cases[i].metric_values;
        json_t *run =
            json_pack("{s:s,s:{s:o,s:o}}", "trainer", "ppo", "metrics", "objective/scores",
                      line_of(cases[i].lines, r[0], r[1], r[2]), cases[i].metric,
                      line_of(cases[i].lines, m[0], m[1], m[2]));
        OK(ctx, test_call(ctx, judge, run));
        if ((int)json_array_size(at(run, "warnings")) != cases[i].warned)
            test_fail(__FILE__, __LINE__, "case %zu: %zu warnings, expected %d", i,
                      json_array_size(at(run, "warnings")), cases[i].warned);
        /* What is not there, or too short, is named. */
        CHECK_EQ_I(json_array_size(at(run, "unchecked")), cases[i].lines < 10 ? 3 : 2);
        json_decref(run);
    }
    rlhf_close(ctx);
}

TEST(warning_of_overfitting) {
    static const struct {
        double value[4];
        int warned;
    } cases[] = {{{3, 2, 1, 1.01}, 0}, {{3, 1, 2, 1.5}, 1}, {{3, 2, 1, 0.5}, 0},
                 {{1, 2, NAN, NAN}, 0}, {{NAN, 1, 1, 1.5}, 1}};
    rlhf_ctx *ctx = test_context("auto", 1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_t *series = json_pack("{s:[i,i,i,i],s:[]}", "step", 10, 20, 30, 40, "value");
        for (int k = 0; k < 4; k++) {
            double v = cases[i].value[k];
            json_array_append_new(at(series, "value"), isnan(v) ? json_null() : json_real(v));
        }
        json_t *run = json_pack("{s:s,s:{s:o}}", "trainer", "sft", "metrics", "eval_loss", series);
        OK(ctx, test_call(ctx, judge, run));
        if ((int)json_array_size(at(run, "warnings")) != cases[i].warned)
            test_fail(__FILE__, __LINE__, "case %zu: %zu warnings", i,
                      json_array_size(at(run, "warnings")));
        if (i == 1) CHECK(strstr(STRING(run, "warnings|0"), "step 20 (1)") != NULL);
        json_decref(run);
    }
    rlhf_close(ctx);
}

/* Every rule that is applied is stated. */
TEST(rules_are_stated) {
    json_t *rules = report_rules();
    CHECK_EQ_I(json_array_size(rules), 2 + REPORT_DRIFTS);
    for (int i = 0; i < REPORT_DRIFTS; i++) {
        char path[16];
        snprintf(path, sizeof path, "%d", i + 1);
        CHECK(strstr(STRING(rules, path), report_drifts[i].metric) != NULL);
    }
    json_decref(rules);
}

/* ---- what runs write for it ------------------------------------------------------------------ */

/* Against all choices of k among n. */
TEST(best_of_n) {
    static const float score[] = {-1.5f, -0.25f, 0, 0.5f, 0.5f, 2};
    enum { N = 6 };
    for (int k = 1; k <= N; k++) {
        double sum = 0;
        int choices = 0;
        for (unsigned set = 0; set < 1u << N; set++) {
            int members = 0, best = 0;
            for (int i = 0; i < N; i++)
                if (set >> i & 1) members++, best = i;
            if (members != k) continue;
            sum += (double)score[best];
            choices++;
        }
        CHECK_NEAR(ppo_mean_best(score, N, k), sum / choices, 1e-12);
    }
}

TEST(repetition) {
    static const struct {
        int n;
        int32_t ids[8];
        double share;
    } cases[] = {{0, {0}, 0},
                 {2, {5, 5}, 0},
                 {3, {5, 5, 5}, 0},
                 {4, {5, 5, 5, 5}, 0.5},
                 {8, {1, 2, 3, 4, 5, 6, 7, 8}, 0},
                 {8, {1, 2, 3, 9, 1, 2, 3, 9}, 2.0 / 6},
                 {8, {7, 7, 7, 7, 7, 7, 7, 7}, 5.0 / 6},
                 {6, {1, 2, 1, 2, 1, 2}, 0.5}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        CHECK_NEAR(ppo_repetition(cases[i].ids, cases[i].n), cases[i].share, 1e-15);
}

TEST_MAIN(CASE(points_in_order), CASE(what_was_run), CASE(names_of_runs), CASE(line_cut_short),
          CASE(errors), CASE(texts_stay_texts), CASE(every_file_is_in_the_program),
          CASE(out_of_memory), CASE(warnings), CASE(warning_of_overfitting),
          CASE(rules_are_stated), CASE(best_of_n), CASE(repetition))
