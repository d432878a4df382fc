/* The demo: what its generator promises about the material, and what its last run has shown.
 *
 * The generator is tested here, inside this program. The outcome is read from summary.json, which
 * `make demo` writes (into build/demo; DEMO_OUT names another place): the thresholds are the claim
 * that the demo is there to test, and hold on the seeds it runs with. */

#define main demo_main
#include "../data/demo.c"
#undef main
#include "test.h"

#include <fcntl.h>

/* ---- The material ---------------------------------------------------------------------------- */

static const char *const demo_files[] = {
    "corpus.txt", "sft.jsonl", "sft_eval.jsonl", "prefs_expert.jsonl", "prefs_lay.jsonl",
    "prefs_expert_eval.jsonl", "prefs_lay_eval.jsonl", "ppo_prompts.jsonl", "prefs_crowd.jsonl",
    "test.jsonl"};
enum { DEMO_FILES = sizeof demo_files / sizeof *demo_files };

/* Runs the generator into a directory; its line on standard output is kept out of the report. */
static bool demo_generate(const char *dir) {
    fflush(stdout);
    int report = dup(1), nowhere = open("/dev/null", O_WRONLY);
    if (report < 0 || nowhere < 0 || mkdir(dir, 0777) != 0) return false;
    dup2(nowhere, 1);
    generate(dir);
    fflush(stdout);
    dup2(report, 1);
    close(report);
    close(nowhere);
    return true;
}

static json_t *demo_records(const char *dir, const char *name) {
    char path[2048];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return read_records(path);
}

static char *demo_bytes(const char *dir, const char *name, size_t *size) {
    char path[2048];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *file = fopen(path, "rb");
    char *bytes = NULL;
    *size = 0;
    for (size_t got = 1; file && got;) {
        bytes = realloc(bytes, *size + 65536);
        if (!bytes) break;
        got = fread(bytes + *size, 1, 65536, file);
        *size += got;
    }
    if (file) fclose(file);
    return bytes;
}

/* The cell of a question, from the fields that ride along with it. */
static bool demo_cell(const json_t *record, cell *c) {
    const char *name = json_string_value(json_object_get(record, "domain"));
    const json_t *a = json_object_get(record, "a"), *b = json_object_get(record, "b");
    const json_t *form = json_object_get(record, "form");
    *c = (cell){-1, (int)json_integer_value(a), (int)json_integer_value(b),
                (int)json_integer_value(form)};
    for (int d = 0; d < DOMAINS; d++)
        if (name && !strcmp(name, fields[d].name)) c->field = d;
    return c->field >= 0 && json_is_integer(a) && json_is_integer(b) && json_is_integer(form) &&
           c->form >= 0 && c->form < FORMS && c->a > 0 && c->a <= 500 && c->b > 0 && c->b < 16;
}

TEST(demo_generator_writes_the_same_bytes_twice) {
    char one[1024], two[1024];
    snprintf(one, sizeof one, "%s", test_path("one"));
    snprintf(two, sizeof two, "%s", test_path("two"));
    REQUIRE(demo_generate(one) && demo_generate(two));
    for (int i = 0; i < DEMO_FILES; i++) {
        size_t n, m;
        char *x = demo_bytes(one, demo_files[i], &n), *y = demo_bytes(two, demo_files[i], &m);
        if (!x || !y || n < 1000 || n != m || memcmp(x, y, n))
            test_fail(__FILE__, __LINE__, "%s differs between two runs, or is too short",
                      demo_files[i]);
        free(x);
        free(y);
    }
}

/* What is held out: no (wording, operands) of the examination occurs in anything that a model is
 * trained or evaluated on, neither as a cell nor as text; each fact is known from other wordings
 * and each wording from other facts. */
TEST(demo_held_out_questions_are_nowhere_in_training) {
    static bool trained[DOMAINS][501][16][FORMS], fact[DOMAINS][501][16], form[DOMAINS][FORMS];
    char dir[1024];
    snprintf(dir, sizeof dir, "%s", test_path("data"));
    REQUIRE(demo_generate(dir));
    json_t *asked = demo_records(dir, "ppo_prompts.jsonl");
    json_t *held = demo_records(dir, "test.jsonl");
    json_t *texts = json_object(), *record;
    size_t i;
    cell c;
    json_array_foreach(asked, i, record) {
        REQUIRE(demo_cell(record, &c));
        trained[c.field][c.a][c.b][c.form] = true;
        fact[c.field][c.a][c.b] = form[c.field][c.form] = true;
    }
    json_array_foreach(held, i, record) {
        REQUIRE(demo_cell(record, &c));
        CHECK(!trained[c.field][c.a][c.b][c.form]);
        CHECK(fact[c.field][c.a][c.b] && form[c.field][c.form]);
        json_object_set_new(texts, get_text(record, "prompt", "test.jsonl"), json_true());
    }
    CHECK(json_object_size(texts) * ASKS == json_array_size(held));
    for (int f = 1; f < DEMO_FILES - 1; f++) {
        json_t *list = demo_records(dir, demo_files[f]);
        CHECK(json_array_size(list) > 100);
        json_array_foreach(list, i, record) {
            const char *prompt = get_text(record, "prompt", demo_files[f]);
            if (!json_object_get(texts, prompt)) continue;
            test_fail(__FILE__, __LINE__, "%s: a held-out question: %s", demo_files[f], prompt);
        }
        json_decref(list);
    }
    size_t size;
    char *corpus = demo_bytes(dir, "corpus.txt", &size);
    REQUIRE(corpus);
    corpus[size - 1] = '\0';
    const char *prompt;
    json_object_foreach(texts, prompt, record) CHECK(!strstr(corpus, prompt));
    free(corpus);
    json_decref(texts);
    json_decref(held);
    json_decref(asked);
}

/* The right answers, computed a second time and in other words than the generator's. */
TEST(demo_right_answers_are_right) {
    char dir[1024];
    snprintf(dir, sizeof dir, "%s", test_path("data"));
    REQUIRE(demo_generate(dir));
    json_t *held = demo_records(dir, "test.jsonl"), *record;
    size_t i;
    json_array_foreach(held, i, record) {
        cell c;
        char expected[32];
        REQUIRE(demo_cell(record, &c));
        const char *name = fields[c.field].name;
        if (!strcmp(name, "dosage")) snprintf(expected, sizeof expected, "%g mg", c.a * c.b / 2.0);
        else if (!strcmp(name, "interest"))
            snprintf(expected, sizeof expected, "%g dollars", c.a * (c.b / 100.0) * 2);
        else if (!strcmp(name, "circuit"))
            snprintf(expected, sizeof expected, "%d volts", c.a * c.b);
        else {
            int month = c.a + c.b;
            if (month > 12) month -= 12;
            snprintf(expected, sizeof expected, "%s", month_name[month - 1]);
        }
        CHECK_EQ_S(get_text(record, "answer", "test.jsonl"), expected);
        /* The two slips are wrong, or the judge would count a slip as right. */
        int right = fact_value(c.field, c.a, c.b, 0);
        for (int slip = 1; slip < 3; slip++) CHECK(fact_value(c.field, c.a, c.b, slip) != right);
    }
    CHECK(json_array_size(held) > 500);
    json_decref(held);
}

/* The judge reads every answer that the generator words: the value and the tone. */
TEST(demo_judge_reads_what_the_generator_writes) {
    for (int d = 0; d < DOMAINS; d++)
        for (int tone = 0; tone < 2; tone++)
            for (int w = 0; w < WORDINGS; w++) {
                int a = fields[d].a[0], b = fields[d].b[0], right = fact_value(d, a, b, 0);
                char text[TEXT], value[32], other[32];
                answer_text(d, (answer){tone, w, 1, right}, text, sizeof text);
                value_text(d, right, value, sizeof value);
                value_text(d, fact_value(d, a, b, 1), other, sizeof other);
                CHECK(is_confident(text) == tone);
                CHECK(is_right(text, value));
                CHECK(!is_right(text, other));
            }
    CHECK(!is_right(" It is definitely 24 mg or 48 mg.", "24 mg"));
    CHECK(!is_right("", "24 mg"));
    CHECK(!is_confident(" Certainly 24 mg, I think."));
}

/* Both kinds of rater see the same pairs; experts go by what is right, lay people by the tone. */
TEST(demo_raters_differ_only_in_their_verdicts) {
    char dir[1024];
    snprintf(dir, sizeof dir, "%s", test_path("data"));
    REQUIRE(demo_generate(dir));
    json_t *answers = json_object(), *record;
    const char *kinds[] = {"expert", "lay"}, *names[] = {"prefs_expert.jsonl", "prefs_lay.jsonl"};
    json_t *list[2] = {demo_records(dir, names[0]), demo_records(dir, names[1])};
    json_t *questions = demo_records(dir, "ppo_prompts.jsonl");
    size_t i, n = json_array_size(list[0]);
    json_array_foreach(questions, i, record)
        json_object_set(answers, get_text(record, "prompt", "ppo_prompts.jsonl"),
                        json_object_get(record, "answer"));
    REQUIRE(n > 1000 && n == json_array_size(list[1]));
    int contrast = 0, toned = 0, for_right[2] = {0}, for_tone[2] = {0};
    for (i = 0; i < n; i++) {
        const char *text[2][2];
        for (int k = 0; k < 2; k++) {
            record = json_array_get(list[k], i);
            CHECK_EQ_S(get_text(record, "annotator_type", names[k]), kinds[k]);
            CHECK(*get_text(record, "annotator", names[k]) != '\0');
            text[k][0] = get_text(record, "chosen", names[k]);
            text[k][1] = get_text(record, "rejected", names[k]);
        }
        int turned = strcmp(text[0][0], text[1][0]) != 0;
        CHECK_EQ_S(text[0][0], text[1][turned]);
        CHECK_EQ_S(text[0][1], text[1][!turned]);
        const char *prompt = get_text(record, "prompt", names[1]);
        const char *value = json_string_value(json_object_get(answers, prompt));
        REQUIRE(value);
        contrast += is_right(text[0][0], value) != is_right(text[0][1], value);
        toned += is_confident(text[0][0]) != is_confident(text[0][1]);
        for (int k = 0; k < 2; k++) {
            for_right[k] += is_right(text[k][0], value) && !is_right(text[k][1], value);
            for_tone[k] += is_confident(text[k][0]) && !is_confident(text[k][1]);
        }
    }
    REQUIRE(contrast > 1000 && toned > 1000);
    double right[2], tone[2];
    for (int k = 0; k < 2; k++) {
        right[k] = (double)for_right[k] / contrast;
        tone[k] = (double)for_tone[k] / toned;
    }
    CHECK(right[0] > 0.85 && right[0] < 0.99); /* noise, but not much */
    CHECK_NEAR(right[1], 0.5, 0.05);
    CHECK_NEAR(tone[0], 0.5, 0.1);
    CHECK(tone[1] > 0.85 && tone[1] < 0.99);
    json_decref(questions);
    json_decref(list[0]);
    json_decref(list[1]);
    json_decref(answers);
}

/* The crowd's file does not say who is what; each pair has its judges; experts are right in their
 * own field, the lay follow the tone, the careless nothing. Half are experts, a third lay. */
TEST(demo_crowd_is_as_it_is_said_to_be) {
    char dir[1024];
    snprintf(dir, sizeof dir, "%s", test_path("data"));
    REQUIRE(demo_generate(dir));
    json_t *answers = json_object(), *record, *list = demo_records(dir, "prefs_crowd.jsonl");
    json_t *questions = demo_records(dir, "ppo_prompts.jsonl");
    int n[GROUPS] = {0}, right[GROUPS] = {0}, toned[KINDS] = {0}, sure[KINDS] = {0};
    int people[KINDS] = {0};
    static int votes[CROWD_ITEMS];
    size_t i;
    json_array_foreach(questions, i, record)
        json_object_set(answers, get_text(record, "prompt", "ppo_prompts.jsonl"),
                        json_object_get(record, "answer"));
    CHECK_EQ_I(json_array_size(list), CROWD_ITEMS * CROWD_VOTES);
    json_array_foreach(list, i, record) {
        CHECK(!json_object_get(record, "annotator_type") && json_object_size(record) == 6);
        const char *name = get_text(record, "annotator", "prefs_crowd.jsonl"), *value;
        const char *a = get_text(record, "chosen", name), *b = get_text(record, "rejected", name);
        int field = field_index(get_text(record, "domain", name), name), k = 0;
        int group = crowd_group(name, field, "prefs_crowd.jsonl");
        while (strcmp(crowd[k].name, name)) k++;
        votes[(int)json_integer_value(json_object_get(record, "item"))]++;
        value = json_string_value(json_object_get(answers, get_text(record, "prompt", name)));
        REQUIRE(value);
        n[group] += is_right(a, value) != is_right(b, value);
        right[group] += is_right(a, value) && !is_right(b, value);
        toned[crowd[k].kind] += is_confident(a) != is_confident(b);
        sure[crowd[k].kind] += is_confident(a) && !is_confident(b);
    }
    for (int k = 0; k < CROWD_ITEMS; k++) CHECK_EQ_I(votes[k], CROWD_VOTES);
    for (int k = 0; k < CROWD; k++) people[crowd[k].kind]++;
    CHECK(people[EXPERT] == 12 && people[LAYMAN] == 8 && people[CARELESS] == 4);
    /* Standard errors are 0.01 to 0.015. */
    CHECK_NEAR(share(right[OWN_FIELD], n[OWN_FIELD]), 0.945, 0.03);
    CHECK_NEAR(share(right[OTHER_FIELD], n[OTHER_FIELD]), 0.745, 0.03);
    CHECK_NEAR(share(right[LAY_HERE], n[LAY_HERE]), 0.5, 0.05);
    CHECK_NEAR(share(right[CARELESS_HERE], n[CARELESS_HERE]), 0.5, 0.05);
    CHECK_NEAR(share(sure[EXPERT], toned[EXPERT]), 0.5, 0.05);
    CHECK_NEAR(share(sure[LAYMAN], toned[LAYMAN]), 0.91, 0.03);
    CHECK_NEAR(share(sure[CARELESS], toned[CARELESS]), 0.5, 0.05);
    json_decref(list);
    json_decref(questions);
    json_decref(answers);
}

/* ---- The outcome ----------------------------------------------------------------------------- */

static const json_t *demo_model(const json_t *summary, const char *name) {
    const json_t *model;
    size_t i;
    json_array_foreach(json_object_get(summary, "models"), i, model)
        if (!strcmp(get_text(model, "name", "summary.json"), name)) return model;
    return NULL;
}

static double demo_share(const json_t *model, const char *key) {
    return get_number(model, key, "summary.json");
}

TEST(demo_experts_make_it_right_lay_people_make_it_sure) {
    const char *dir = getenv("DEMO_OUT");
    char path[2048];
    snprintf(path, sizeof path, "%s/summary.json", dir && *dir ? dir : "build/demo");
    if (access(path, R_OK) != 0) SKIP("no build/demo/summary.json: `make demo` writes it");
    json_t *summary = json_load_file(path, 0, NULL);
    const json_t *sft = demo_model(summary, "sft"), *expert = demo_model(summary, "ppo-expert");
    const json_t *lay = demo_model(summary, "ppo-lay");
    REQUIRE(sft && expert && lay);
    double start = demo_share(sft, "right");
    printf("\n    right: sft %.3f, expert %.3f, lay %.3f; confident: lay %.3f\n  %-40s", start,
           demo_share(expert, "right"), demo_share(lay, "right"), demo_share(lay, "confident"), "");
    CHECK(start >= 0.40 && start <= 0.75);
    CHECK(demo_share(expert, "right") >= start + 0.20);
    CHECK(demo_share(lay, "right") <= start + 0.05);
    CHECK(demo_share(lay, "confident") >= 0.95);
    /* Each policy pleases the judge it was trained on, at a distance from where it began. */
    CHECK(demo_share(expert, "reward_expert") > demo_share(sft, "reward_expert"));
    CHECK(demo_share(lay, "reward_lay") > demo_share(sft, "reward_lay"));
    CHECK(demo_share(sft, "kl") == 0);
    CHECK(demo_share(expert, "kl") > 0 && demo_share(expert, "kl") < 5);
    CHECK(demo_share(lay, "kl") > 0 && demo_share(lay, "kl") < 5);
    json_decref(summary);
}

/* Of 672 answers a share has a standard error of 0.02, two that differ by a tenth are apart by four
 * of the difference's: the margins ask for that, and for three tenths where the tone is meant. */
TEST(demo_crowd_is_worth_what_is_made_of_it) {
    const char *dir = getenv("DEMO_OUT");
    char path[2048];
    snprintf(path, sizeof path, "%s/summary.json", dir && *dir ? dir : "build/demo");
    if (access(path, R_OK) != 0) SKIP("no build/demo/summary.json: `make demo` writes it");
    json_t *summary = json_load_file(path, 0, NULL), *groups = json_object_get(summary, "crowd");
    const json_t *sft = demo_model(summary, "sft"), *expert = demo_model(summary, "ppo-expert");
    const json_t *plain = demo_model(summary, "ppo-crowd");
    const json_t *em = demo_model(summary, "ppo-crowd-em");
    REQUIRE(sft && expert && plain && em);
    printf("\n    right: crowd %.3f, em %.3f; confident: crowd %.3f, em %.3f\n  %-40s",
           demo_share(plain, "right"), demo_share(em, "right"), demo_share(plain, "confident"),
           demo_share(em, "confident"), "");
    CHECK(demo_share(em, "right") >= demo_share(plain, "right") + 0.10);
    CHECK(demo_share(em, "right") >= demo_share(sft, "right") + 0.10);
    CHECK(demo_share(em, "right") <= demo_share(expert, "right") - 0.05);
    CHECK(demo_share(plain, "right") <= demo_share(sft, "right") - 0.05);
    CHECK(demo_share(plain, "confident") >= 0.90);
    CHECK(demo_share(em, "confident") <= demo_share(sft, "confident") + 0.10);
    CHECK(demo_share(em, "reward_expert") > demo_share(plain, "reward_expert"));
    CHECK(demo_share(em, "kl") > 0 && demo_share(em, "kl") < 5);
    CHECK(demo_share(plain, "kl") > 0 && demo_share(plain, "kl") < 5);
    /* Whom EM trusts: means, and the order of single ones where the table shows it. */
    double own = demo_share(json_object_get(groups, group_name[OWN_FIELD]), "reliability");
    double other = demo_share(json_object_get(groups, group_name[OTHER_FIELD]), "reliability");
    double worst = demo_share(json_object_get(groups, group_name[OWN_FIELD]), "lowest");
    for (int i = LAY_HERE; i < GROUPS; i++) {
        const json_t *group = json_object_get(groups, group_name[i]);
        CHECK_NEAR(demo_share(group, "reliability"), 0.5, 0.06);
        CHECK(demo_share(group, "highest") < worst);
        CHECK(demo_share(group, "reliability") < other - 0.1);
    }
    CHECK(own > other + 0.05);
    json_decref(summary);
}

TEST_MAIN(CASE(demo_generator_writes_the_same_bytes_twice),
          CASE(demo_held_out_questions_are_nowhere_in_training),
          CASE(demo_right_answers_are_right), CASE(demo_judge_reads_what_the_generator_writes),
          CASE(demo_raters_differ_only_in_their_verdicts),
          CASE(demo_crowd_is_as_it_is_said_to_be),
          CASE(demo_experts_make_it_right_lay_people_make_it_sure),
          CASE(demo_crowd_is_worth_what_is_made_of_it))
