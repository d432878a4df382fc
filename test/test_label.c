/* Judgements of people (sections LABEL, POOL, SERVE), from inside: who is asked what, what they are
 * not told, orders, undo, torn lines, qualification, tokens. test/test_cli.c asks in a terminal,
 * test/label_load.py over sockets, test/pages_label.py in a browser. */

#define RLHF_MAIN 1
#define main program_main
#include "../rlhf.c"
#undef main
#include "test.h"

static label_config config(void) {
    label_config c;
    memset(&c, 0, sizeof c);
    train_fill(label_fields, (int)(sizeof label_fields / sizeof *label_fields), &c);
    return c;
}

static const char *const two =
    "{\"item\":1,\"domain\":\"law\",\"prompt\":\"p\",\"answers\":[\"x\",\"y\"]}\n"
    "{\"item\":2,\"domain\":\"art\",\"prompt\":\"p\",\"chosen\":\"x\",\"rejected\":\"z\"}\n";

/* A judgement of the item that annotator w is given now; its status. */
static int judge(label *l, int w, const char *choice) {
    int i = label_next(l, w);
    if (i < 0) return -1;
    json_t *said = label_show(l, w, i);
    json_object_set_new(said, "choice", json_string(choice));
    int status = label_judge(l, w, said);
    json_decref(said);
    return status;
}

/* What was chosen as A is, in the file, the answer that was shown as A; undo takes the line away, a
 * torn line is cut off, and a second start knows what the first one was told. */
TEST(label_file) {
    rlhf_ctx *ctx = test_context("auto", 1);
    label_config c = config();
    char out[1024], pairs[1024];
    snprintf(pairs, sizeof pairs, "%s", test_write("pairs.jsonl", two));
    snprintf(out, sizeof out, "%s", test_path("out.jsonl"));
    c.pairs = pairs;
    label l = {.ctx = ctx, .c = &c, .out = out};
    OK(ctx, label_open(&l));
    CHECK_EQ_I(l.n_items, 2);
    int i = label_next(&l, 0);
    CHECK_EQ_I(label_next(&l, 0), i); /* the same until it is judged */
    json_t *shown = label_show(&l, 0, i), *said = NULL;
    CHECK_EQ_I(judge(&l, 0, "A"), 200);
    CHECK_EQ_I(label_judge(&l, 0, shown), 409);
    CHECK_EQ_I(label_sync(&l), 0);

    json_t *record = json_load_file(out, 0, NULL);
    int side = data_side(json_object_get(record, "choice"));
    CHECK_EQ_S(json_string_value(json_array_get(json_object_get(record, "answers"), (size_t)side)),
               json_string_value(json_array_get(json_object_get(shown, "answers"), 0)));
    CHECK_EQ_I(json_integer_value(json_array_get(json_object_get(record, "order"), 0)), side);
    json_decref(record), json_decref(shown);
    CHECK_EQ_I(label_undo(&l, 0, &said), 200);
    json_decref(said);
    CHECK_EQ_I(l.size, 0);
    CHECK_EQ_I(label_undo(&l, 0, &said), 409);
    CHECK_EQ_I(judge(&l, 0, "tie"), 200);
    CHECK_EQ_I(judge(&l, 0, "wrong"), 400);
    off_t whole = l.size;
    CHECK_EQ_I(write(l.fd, "{\"half", 6), 6);
    label_free(&l);
    label again = {.ctx = ctx, .c = &c, .out = out};
    OK(ctx, label_open(&again));
    CHECK_EQ_I(again.size, whole);
    CHECK_EQ_I(again.judgements, 1);
    CHECK_EQ_I(judge(&again, 0, "B"), 200);
    CHECK_EQ_I(judge(&again, 0, "B"), -1);
    label_free(&again);

    rlhf_close(ctx);
}

/* Items go to annotators of their domain, gold items come first, and judgements count after. */
TEST(label_qualify) {
    rlhf_ctx *ctx = test_context("auto", 1);
    label_config c = config();
    char out[1024], pairs[1024], gold[1024], people[1024];
    snprintf(pairs, sizeof pairs, "%s", test_write("pairs.jsonl", two));
    snprintf(gold, sizeof gold, "%s",
             test_write("gold.jsonl", "{\"domain\":\"law\",\"prompt\":\"g\",\"chosen\":\"r\","
                                      "\"rejected\":\"w\"}\n{\"domain\":\"art\",\"prompt\":\"h\","
                                      "\"chosen\":\"r\",\"rejected\":\"w\"}\n"));
    snprintf(people, sizeof people, "%s",
             test_write("people.json", "[{\"name\":\"ann\",\"domains\":[\"law\"]}]"));
    snprintf(out, sizeof out, "%s", test_path("out.jsonl"));
    c.pairs = pairs, c.gold = gold, c.annotators = people, c.qualify = "1:1";
    label l = {.ctx = ctx, .c = &c, .out = out};
    OK(ctx, label_open(&l));
    int i = label_next(&l, 0);
    CHECK(l.item[i].gold >= 0 && !strcmp(label_domain(l.item + i), "law"));
    int right = label_flip(&l, l.who, l.item + i) ^ l.item[i].gold;
    CHECK_EQ_I(judge(&l, 0, right ? "B" : "A"), 200);
    CHECK(label_vet_of(l.who, "law")->passed);
    i = label_next(&l, 0);
    CHECK_EQ_S(label_domain(l.item + i), "law");
    CHECK_EQ_I(judge(&l, 0, "A"), 200);
    CHECK_EQ_I(l.item[i].counted, 1);
    CHECK_EQ_I(judge(&l, 0, "A"), -1); /* art is not theirs */
    label_free(&l);
    rlhf_close(ctx);
}

/* ---- several annotators ---------------------------------------------------------------------- */

static char paths[4][1024]; /* of files that a config names */

/* A label on n pairs, with annotators; gold may be null. */
static label several(rlhf_ctx *ctx, label_config *c, int n, const char *people, const char *gold) {
    static char text[1 << 14];
    size_t at = 0;
    for (int i = 0; i < n; i++)
        at += (size_t)snprintf(text + at, sizeof text - at,
                               "{\"item\":%d,\"domain\":\"law\",\"prompt\":\"p\",\"answers\":"
                               "[\"x%d\",\"y%d\"],\"sources\":[{\"model\":\"old\"},{\"model\":"
                               "\"new\"}]}\n",
                               i, i, i);
    snprintf(paths[0], sizeof paths[0], "%s", test_write("pairs.jsonl", text));
    snprintf(paths[1], sizeof paths[1], "%s", test_write("people.json", people));
    if (gold) snprintf(paths[2], sizeof paths[2], "%s", test_write("gold.jsonl", gold));
    snprintf(paths[3], sizeof paths[3], "%s", test_path("out.jsonl"));
    c->pairs = paths[0], c->annotators = paths[1];
    if (gold) c->gold = paths[2];
    label l = {.ctx = ctx, .c = c, .out = paths[3]};
    OK(ctx, label_open(&l));
    return l;
}

/* The n-th record of the file, from 0; null: there are fewer. */
static json_t *record_of(int n) {
    FILE *f = fopen(paths[3], "r");
    json_t *record = NULL;
    for (int i = 0; f && i <= n; i++) {
        json_decref(record);
        record = json_loadf(f, JSON_DISABLE_EOF_CHECK, NULL);
    }
    if (f) fclose(f);
    return record;
}

static const char *const ann_and_bob =
    "[{\"name\":\"ann\",\"kind\":\"expert\"},{\"name\":\"bob\",\"kind\":\"lay\"}]";

/* Undo gives back what was sent, whoever judged in between, and also after a restart; the file is
 * then as if it had not been said. */
TEST(label_undo_after_restart) {
    enum { N = 6 };
    rlhf_ctx *ctx = test_context("auto", 1);
    label_config c = config();
    c.aspects = "accuracy,tone";
    c.per_item = 2;
    label l = several(ctx, &c, N, ann_and_bob, NULL);
    json_t *sent[N], *back = NULL;
    int flips = 0;
    for (int k = 0; k < N; k++) {
        int i = label_next(&l, 0);
        flips += label_flip(&l, l.who, l.item + i);
        json_t *shown = label_show(&l, 0, i);
        sent[k] = json_pack("{s:O,s:O,s:s,s:f,s:s}", "id", json_object_get(shown, "id"), "token",
                            json_object_get(shown, "token"), "choice", label_words[k % LABEL_WORDS],
                            "seconds", 1.5 + k, "reason", "\"why\"\n\xF0\x9F\xA6\x99");
        json_decref(shown);
        if (k % LABEL_WORDS < LABEL_TIE) json_object_set_new(sent[k], "strength", json_integer(2));
        json_object_set_new(sent[k], "aspects",
                            json_pack("{s:s,s:s}", "accuracy", k % 2 ? "A" : "B", "tone", "tie"));
        json_object_set_new(sent[k], "unsafe", json_pack("[b,b]", k % 2, !(k % 2)));
        CHECK_EQ_I(label_judge(&l, 0, sent[k]), 200);
        CHECK_EQ_I(judge(&l, 1, "tie"), 200);
    }
    CHECK(flips > 0 && flips < N);
    CHECK_EQ_I(label_sync(&l), 0);
    label_free(&l);
    CHECK_EQ_I(chmod(paths[3], 0600), 0);

    label again = {.ctx = ctx, .c = &c, .out = paths[3]};
    OK(ctx, label_open(&again));
    for (int k = N; k--;) {
        CHECK_EQ_I(label_undo(&again, 0, &back), 200);
        CHECK(json_equal(back, sent[k]));
        CHECK_EQ_S(again.item[again.who[0].current].id,
                   json_string_value(json_object_get(sent[k], "id")));
        json_decref(back);
        if (k != 2) continue;
        /* In the middle: what is taken back may be said again. */
        json_object_set_new(sent[2], "choice", json_string("B"));
        CHECK_EQ_I(label_judge(&again, 0, sent[2]), 200);
        CHECK_EQ_I(label_undo(&again, 0, &back), 200);
        CHECK(json_equal(back, sent[2]));
        json_decref(back);
    }
    CHECK_EQ_I(label_undo(&again, 0, &back), 409);
    CHECK_EQ_I(again.judgements, N);
    for (int k = 0; k < N; k++) {
        json_t *record = record_of(k);
        CHECK_EQ_S(json_string_value(json_object_get(record, "annotator")), "bob");
        json_decref(record), json_decref(sent[k]);
    }
    CHECK(record_of(N) == NULL);
    struct stat mode;
    CHECK(!stat(paths[3], &mode) && (mode.st_mode & 0777) == 0600);
    CHECK_EQ_I(label_undo(&again, 1, &back), 200);
    json_decref(back);
    label_free(&again);
    rlhf_close(ctx);
}

/* The same answers in the other order are the same item, and what was said of it still holds. */
TEST(label_undo_of_turned_answers) {
    rlhf_ctx *ctx = test_context("auto", 1);
    label_config c = config();
    label l = several(ctx, &c, 1, ann_and_bob, NULL);
    json_t *shown = label_show(&l, 0, label_next(&l, 0)), *back = NULL;
    CHECK_EQ_I(judge(&l, 0, "A"), 200);
    label_free(&l);
    test_write("pairs.jsonl",
               "{\"item\":0,\"domain\":\"law\",\"prompt\":\"p\",\"answers\":[\"y0\",\"x0\"]}\n");
    label again = {.ctx = ctx, .c = &c, .out = paths[3]};
    OK(ctx, label_open(&again));
    CHECK_EQ_I(label_undo(&again, 0, &back), 200);
    json_t *now = label_show(&again, 0, again.who[0].current);
    int chosen = !strcmp(json_string_value(json_object_get(back, "choice")), "B");
    CHECK(json_equal(json_array_get(json_object_get(now, "answers"), (size_t)chosen),
                     json_array_get(json_object_get(shown, "answers"), 0)));
    json_decref(shown), json_decref(now), json_decref(back);
    label_free(&again);
    rlhf_close(ctx);
}

/* Texts that were written come back, too, and what was skipped as skipped. */
TEST(label_undo_of_texts) {
    rlhf_ctx *ctx = test_context("auto", 1);
    label_config c = config();
    char out[1024], prompts[1024];
    snprintf(prompts, sizeof prompts, "%s",
             test_write("prompts.jsonl", "{\"prompt\":\"a\"}\n{\"prompt\":\"b\"}\n"));
    snprintf(out, sizeof out, "%s", test_path("out.jsonl"));
    c.task = "write", c.prompts = prompts;
    label l = {.ctx = ctx, .c = &c, .out = out};
    OK(ctx, label_open(&l));
    json_t *sent[2], *back = NULL;
    for (int k = 0; k < 2; k++) {
        json_t *shown = label_show(&l, 0, label_next(&l, 0));
        sent[k] = json_pack("{s:O,s:O,s:i}", "id", json_object_get(shown, "id"), "token",
                            json_object_get(shown, "token"), "seconds", 3);
        if (k) json_object_set_new(sent[k], "skip", json_true());
        else json_object_set_new(sent[k], "text", json_string("one\n two"));
        CHECK_EQ_I(label_write(&l, 0, sent[k]), 200);
        json_decref(shown);
    }
    label_free(&l);
    label again = {.ctx = ctx, .c = &c, .out = out};
    OK(ctx, label_open(&again));
    for (int k = 2; k--;) {
        CHECK_EQ_I(label_undo(&again, 0, &back), 200);
        CHECK(json_equal(back, sent[k]));
        json_decref(back), json_decref(sent[k]);
    }
    CHECK_EQ_I(again.size, 0);
    label_free(&again);
    rlhf_close(ctx);
}

/* What an annotator is shown holds neither origin nor gold, and how much is left does not tell
 * which items are gold ones: it grows less by one with each, and ends with none. */
TEST(label_tells_neither_origin_nor_gold) {
    static const char gold[] =
        "{\"domain\":\"law\",\"prompt\":\"g\",\"chosen\":\"r\",\"rejected\":\"w\"}\n"
        "{\"domain\":\"law\",\"prompt\":\"h\",\"chosen\":\"r\",\"rejected\":\"w\"}\n"
        "{\"domain\":\"law\",\"prompt\":\"i\",\"answers\":[\"w\",\"r\"],\"gold\":\"B\"}\n";
    rlhf_ctx *ctx = test_context("auto", 1);
    for (int k = 0; k < 2; k++) {
        label_config c = config();
        c.qualify = k ? "3:0" : "";
        c.gold_every = 5;
        int others = k ? 2 : 12;
        label l = several(ctx, &c, others, "[{\"name\":\"ann\"}]", gold);
        int left = -1, golds = 0, first_golds = 0, n = 0;
        for (int i; (i = label_next(&l, 0)) >= 0; n++) {
            json_t *shown = label_show(&l, 0, i), *progress = label_progress(&l, 0), *v;
            const char *key;
            json_object_foreach(shown, key, v)
                if (!strstr(" id token domain prompt answers ", key))
                    test_fail(__FILE__, __LINE__, "\"%s\" is shown", key);
            int now = (int)(json_integer_value(json_object_get(progress, "total")) -
                            json_integer_value(json_object_get(progress, "done")));
            if (left >= 0) CHECK_EQ_I(now, left - 1);
            left = now;
            golds += l.item[i].gold >= 0;
            if (n < 3) first_golds += l.item[i].gold >= 0;
            json_decref(shown), json_decref(progress);
            CHECK_EQ_I(judge(&l, 0, "A"), 200);
        }
        CHECK_EQ_I(left, 1);
        CHECK_EQ_I(n, others + golds);
        CHECK(golds >= 2);
        if (k) CHECK_EQ_I(first_golds, 3);
        label_free(&l);
        unlink(paths[3]);
    }
    rlhf_close(ctx);
}

/* Each item gets its two judgements, of two people, and no third one. */
TEST(label_per_item) {
    rlhf_ctx *ctx = test_context("auto", 1);
    label_config c = config();
    c.per_item = 2;
    label l = several(ctx, &c, 5, "[{\"name\":\"a\"},{\"name\":\"b\"},{\"name\":\"c\"}]", NULL);
    int judged[5][3] = {{0}}, all = 0, total = 0;
    for (int w = 0; w < 9; w++) {
        int i = label_next(&l, w % 3);
        /* c looks at their first item, and leaves. */
        if (i < 0 || w % 3 == 2) continue;
        CHECK_EQ_I(judge(&l, w % 3, "B"), 200);
        judged[i][w % 3]++;
        total++;
    }
    CHECK_EQ_I(total, 6);
    for (int go = 1; go;) {
        go = 0;
        for (int w = 0; w < 3; w++) {
            int i = label_next(&l, w);
            if (i < 0) continue;
            CHECK_EQ_I(judge(&l, w, "tie"), 200);
            judged[i][w]++;
            go = 1;
        }
    }
    for (int i = 0; i < 5; i++) {
        int n = 0;
        for (int w = 0; w < 3; w++) n += judged[i][w], all |= judged[i][w] << w;
        CHECK_EQ_I(n, 2);
        CHECK(judged[i][0] < 2 && judged[i][1] < 2 && judged[i][2] < 2);
    }
    CHECK(all == 7 && label_done(&l));
    label_free(&l);
    rlhf_close(ctx);
}

/* Who has a gold item wrong judges on; it is kept, marked, and the item is still another's to
 * judge. That person is right, and counts. */
TEST(label_unqualified) {
    rlhf_ctx *ctx = test_context("auto", 1);
    label_config c = config();
    c.qualify = "1:1";
    label l = several(ctx, &c, 1, ann_and_bob,
                      "{\"domain\":\"law\",\"prompt\":\"g\",\"chosen\":\"r\","
                      "\"rejected\":\"w\"}\n");
    for (int w = 0; w < 2; w++) {
        int i = label_next(&l, w), right = label_flip(&l, l.who + w, l.item + i) ^ l.item[i].gold;
        CHECK(l.item[i].gold >= 0);
        CHECK_EQ_I(judge(&l, w, right ^ !w ? "B" : "A"), 200);
        i = label_next(&l, w);
        CHECK(i >= 0 && l.item[i].gold < 0);
        CHECK_EQ_I(judge(&l, w, "A"), 200);
        CHECK_EQ_I(l.item[i].counted, w);
        CHECK_EQ_I(label_done(&l), w);
    }
    for (int k = 0; k < 4; k++) {
        json_t *record = record_of(k);
        CHECK_EQ_S(json_string_value(json_object_get(record, "annotator")), k < 2 ? "ann" : "bob");
        CHECK_EQ_I(json_is_false(json_object_get(record, "qualified")), k < 3);
        CHECK_EQ_I(json_object_get(record, "gold") != NULL, k % 2 == 0);
        json_decref(record);
    }
    label_free(&l);
    rlhf_close(ctx);
}

/* Every member that a record has, by name. */
TEST(label_record) {
    rlhf_ctx *ctx = test_context("auto", 1);
    label_config c = config();
    label l = several(ctx, &c, 1, ann_and_bob, NULL);
    json_t *said = label_show(&l, 0, label_next(&l, 0)), *record;
    json_object_set_new(said, "choice", json_string("A"));
    json_object_set_new(said, "strength", json_integer(3));
    json_object_set_new(said, "seconds", json_real(2.5));
    CHECK_EQ_I(label_judge(&l, 0, said), 200);
    record = record_of(0);
    int flip = label_flip(&l, l.who, l.item), year = 0;
    json_t *expected = json_pack(
        "{s:s,s:[s,s],s:s,s:i,s:s,s:s,s:s,s:[i,i],s:f,s:O,s:i,s:[{s:s},{s:s}]}", "prompt", "p",
        "answers", "x0", "y0", "choice", flip ? "B" : "A", "strength", 3, "annotator", "ann",
        "annotator_type", "expert", "domain", "law", "order", flip, !flip, "seconds", 2.5, "time",
        json_object_get(record, "time"), "item", 0, "sources", "model", "old", "model", "new");
    CHECK(json_equal(record, expected));
    CHECK(sscanf(json_string_value(json_object_get(record, "time")), "%d-", &year) == 1);
    CHECK(year >= 2024);
    json_decref(record), json_decref(expected), json_decref(said);
    label_free(&l);
    rlhf_close(ctx);
}

/* A file that lines cannot be added to is left as it is; and two programs do not write one file. */
TEST(label_refuses_the_file) {
    static const char array[] = "[{\"prompt\":\"p\",\"chosen\":\"a\",\"rejected\":\"b\","
                                "\"annotator\":\"w\"}]\n";
    rlhf_ctx *ctx = test_context("auto", 1);
    label_config c = config();
    label l = several(ctx, &c, 1, ann_and_bob, NULL);
    label second = {.ctx = ctx, .c = &c, .out = paths[3]};
    CHECK_EQ_I(label_open(&second), RLHF_ERR_IO);
    CHECK(strstr(rlhf_error(ctx), "another program is writing it") != NULL);
    label_free(&second);
    label_free(&l);
    for (int k = 0; k < 2; k++) {
        if (k) {
            gzFile f = gzopen(paths[3], "wb");
            gzwrite(f, array, sizeof array - 1);
            gzclose(f);
        } else test_write("out.jsonl", array);
        struct stat before, after;
        stat(paths[3], &before);
        label other = {.ctx = ctx, .c = &c, .out = paths[3]};
        CHECK_EQ_I(label_open(&other), RLHF_ERR_DATA);
        CHECK(strstr(rlhf_error(ctx), k ? "compressed" : "a JSON array") != NULL);
        label_free(&other);
        stat(paths[3], &after);
        CHECK_EQ_I(before.st_size, after.st_size);
    }
    rlhf_close(ctx);
}

TEST(label_tokens) {
    CHECK(serve_same_token("abc", "abc"));
    CHECK(!serve_same_token("abc", "abd"));
    CHECK(!serve_same_token("abc", "abcd"));
    CHECK(!serve_same_token("abcd", "abc"));
    CHECK(!serve_same_token("", ""));
}

TEST_MAIN(CASE(label_file), CASE(label_undo_after_restart), CASE(label_undo_of_turned_answers),
          CASE(label_undo_of_texts), CASE(label_tells_neither_origin_nor_gold),
          CASE(label_per_item), CASE(label_unqualified), CASE(label_record),
          CASE(label_refuses_the_file), CASE(label_qualify), CASE(label_tokens))
