/* Judgements of people (sections 33 to 35), from inside: who is asked what, orders, undo, torn
 * lines, qualification, tokens. test/label_load.py does the rest over sockets. */

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

TEST(label_tokens) {
    CHECK(serve_same_token("abc", "abc"));
    CHECK(!serve_same_token("abc", "abd"));
    CHECK(!serve_same_token("abc", "abcd"));
    CHECK(!serve_same_token("abcd", "abc"));
    CHECK(!serve_same_token("", ""));
}

TEST_MAIN(CASE(label_file), CASE(label_qualify), CASE(label_tokens))
