/* Records: every form of every kind, which tokens bear loss, what is kept of a record,
 * what is dropped and counted, and what is refused with file:line.
 *
 * With a vocabulary of single bytes a record's tokens can be written as its text: '{' opens and
 * '}' closes what bears loss, '$' is the end-of-text token. */

#include "../rlhf.c"
#include "test.h"

/* ---- helpers --------------------------------------------------------------------------------- */

/* A tokenizer of `size` entries; 257: one for each byte. */
static rlhf_tokenizer *train_tok(rlhf_ctx *ctx, int size) {
    static const char text[] =
        "the cat sat on the mat. the dog sat on the cat. Human: hello there! Assistant: the cat is "
        "on the mat, the dog is in the house, and the house is on the hill. Human: hello again!";
    const char *texts[1] = {text};
    size_t lens[1] = {sizeof text - 1};
    rlhf_tokenizer *tok = NULL;
    if (rlhf_tokenizer_train(ctx, texts, lens, 1, size, &tok) != RLHF_OK)
        test_fail(__FILE__, __LINE__, "tokenizer: %s", rlhf_error(ctx));
    return tok;
}

/* JSON text with ' for ". The last two results stay valid. */
static const char *quoted(const char *text) {
    static char buffers[2][8192];
    static int next;
    char *out = buffers[next++ % 2];
    snprintf(out, sizeof buffers[0], "%s", text);
    for (char *c = out; *c; c++)
        if (*c == '\'') *c = '"';
    return out;
}

static rlhf_status parse(rlhf_ctx *ctx, rlhf_tokenizer *tok, const rlhf_data_config *config,
                         const char *jsonl, rlhf_dataset **d) {
    const char *text = quoted(jsonl);
    return rlhf_dataset_parse(ctx, text, strlen(text), "mem.jsonl", tok, config, d);
}

/* The sequence as its text with marks; NUL-terminated. The last two results stay valid. */
static const char *marked(rlhf_ctx *ctx, rlhf_tokenizer *tok, const data_seq *s) {
    static char buffers[2][8192];
    static int next;
    char *out = buffers[next++ % 2];
    size_t n = 0;
    int inside = 0;
    for (int t = 0; t < s->n; t++) {
        char *piece = NULL;
        size_t len = 0;
        if (s->loss[t] != inside) out[n++] = inside ? '}' : '{';
        inside = s->loss[t];
        if (s->ids[t] == tok->eos) {
            out[n++] = '$';
            continue;
        }
        if (rlhf_decode(tok, s->ids + t, 1, 0, &piece, &len) != RLHF_OK) continue;
        if (n + len + 4 < sizeof buffers[0]) memcpy(out + n, piece, len), n += len;
        rlhf_free(ctx, piece);
    }
    if (inside) out[n++] = '}';
    out[n] = 0;
    return out;
}

/* One record of a kind, its sequences as marked text. b: of the rejected answer, or null. */
static void check_record(int line, rlhf_data_config config, const char *record, const char *a,
                         const char *b) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = train_tok(ctx, 257);
    rlhf_dataset *d = NULL;
    if (parse(ctx, tok, &config, record, &d) != RLHF_OK) {
        test_fail(__FILE__, line, "%s: %s", record, rlhf_error(ctx));
    } else {
        const data_record *r = d->record;
        test_eq_i(__FILE__, line, "records", "1", d->n, 1);
        test_eq_s(__FILE__, line, "sequence", "expected", marked(ctx, tok, &r->a), a);
        if (b) test_eq_s(__FILE__, line, "rejected", "expected", marked(ctx, tok, &r->b), b);
        test_eq_i(__FILE__, line, "tokens", "sum", rlhf_dataset_tokens(d), r->a.n + r->b.n);
    }
    rlhf_dataset_close(d);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

#define SFT(record, want)                                                                          \
    check_record(__LINE__, rlhf_data_config_default(RLHF_DATA_SFT), record, want, NULL)
#define PAIR(record, chosen, rejected)                                                             \
    check_record(__LINE__, rlhf_data_config_default(RLHF_DATA_PREFERENCE), record, chosen, rejected)
#define PROMPT(record, want)                                                                       \
    check_record(__LINE__, rlhf_data_config_default(RLHF_DATA_PROMPT), record, want, NULL)

static rlhf_data_config with_chat(rlhf_data_kind kind, const char *name) {
    rlhf_data_config c = rlhf_data_config_default(kind);
    c.chat_template = name;
    return c;
}

/* ---- which tokens bear loss ------------------------------------------------------------------ */

TEST(text_bears_loss_everywhere) {
    SFT("{'text':'abc'}", "a{bc$}");
    SFT("{'text':'two\\nlines '}", "t{wo\nlines $}");
    /* An end-of-text token that is there is not doubled. */
    SFT("{'text':'abc<|endoftext|>'}", "a{bc$}");
    rlhf_data_config c = rlhf_data_config_default(RLHF_DATA_SFT);
    c.add_eos = 0;
    check_record(__LINE__, c, "{'text':'abc'}", "a{bc}", NULL);
}

TEST(completions_bear_loss) {
    static const char *const names[] = {"completion", "response", "output", "answer"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char record[128];
        snprintf(record, sizeof record, "{'prompt':'Q: 1+1\\nA:','%s':' 2'}", names[i]);
        SFT(record, "Q: 1+1\nA:{ 2$}");
    }
    SFT("{'prompt':'p','completion':' c<|endoftext|>'}", "p{ c$}");
    SFT("{'prompt':'','completion':'abc'}", "a{bc$}");
    /* Nothing to say is said by ending at once. */
    SFT("{'prompt':'p q','completion':''}", "p q{$}");
    SFT("{'prompt':'p','completion':'c','text':'ignored'}", "p{c$}");
    rlhf_data_config c = rlhf_data_config_default(RLHF_DATA_SFT);
    c.completion_only_loss = 0;
    check_record(__LINE__, c, "{'prompt':'pq','completion':' c'}", "p{q c$}", NULL);
    c = rlhf_data_config_default(RLHF_DATA_SFT);
    c.add_eos = 0;
    check_record(__LINE__, c, "{'prompt':'pq','completion':' c'}", "pq{ c}", NULL);
}

TEST(every_assistant_turn_bears_loss) {
    SFT("{'messages':[{'role':'user','content':'a'},{'role':'assistant','content':'b'}]}",
        "\n\nHuman: a\n\nAssistant:{ b$}");
    SFT("{'messages':[{'role':'system','content':'s'},{'role':'user','content':'a'},"
        "{'role':'assistant','content':'bb'},{'role':'user','content':'c'},"
        "{'role':'assistant','content':'dd'}]}",
        "\n\nSystem: s\n\nHuman: a\n\nAssistant:{ bb}\n\nHuman: c\n\nAssistant:{ dd$}");
}

TEST(lists_of_turns_as_prompt_and_completion) {
    SFT("{'prompt':[{'role':'user','content':'a'}],"
        "'completion':[{'role':'assistant','content':'b'}]}",
        "\n\nHuman: a\n\nAssistant:{ b$}");
    SFT("{'prompt':[{'role':'user','content':'a'}],'completion':'b'}",
        "\n\nHuman: a\n\nAssistant:{ b$}");
    SFT("{'prompt':'a','completion':[{'role':'assistant','content':'b'}]}",
        "\n\nHuman: a\n\nAssistant:{ b$}");
    /* Several turns may be the completion. */
    SFT("{'prompt':[{'role':'user','content':'a'}],'completion':[{'role':'assistant',"
        "'content':'b'},{'role':'user','content':'c'},{'role':'assistant','content':'d'}]}",
        "\n\nHuman: a\n\nAssistant:{ b}\n\nHuman: c\n\nAssistant:{ d$}");
}

/* The prompt of a prompt-completion record bears no loss, its assistant turns included. */
TEST(assistant_turns_of_a_prompt_bear_none) {
    SFT("{'prompt':[{'role':'user','content':'a'},{'role':'assistant','content':'b'},"
        "{'role':'user','content':'c'}],'completion':'d'}",
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:{ d$}");
}

TEST(preferences_with_a_prompt) {
    PAIR("{'prompt':'Q\\nA:','chosen':' yes','rejected':' no'}", "Q\nA:{ yes$}", "Q\nA:{ no$}");
    PAIR("{'prompt':[{'role':'user','content':'a'},{'role':'assistant','content':'b'},"
         "{'role':'user','content':'c'}],'chosen':'yes','rejected':'no'}",
         "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:{ yes$}",
         "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:{ no$}");
    PAIR("{'prompt':[{'role':'user','content':'a'}],'chosen':[{'role':'assistant','content':'x'}],"
         "'rejected':[{'role':'assistant','content':'y'}]}",
         "\n\nHuman: a\n\nAssistant:{ x$}", "\n\nHuman: a\n\nAssistant:{ y$}");
    PAIR("{'prompt':'a','chosen':[{'role':'assistant','content':'x'}],"
         "'rejected':[{'role':'assistant','content':'y'}]}",
         "\n\nHuman: a\n\nAssistant:{ x$}", "\n\nHuman: a\n\nAssistant:{ y$}");
}

TEST(preferences_without_a_prompt) {
    /* The space before the first difference belongs to the answers. */
    PAIR("{'chosen':'I say yes','rejected':'I say no'}", "I say{ yes$}", "I say{ no$}");
    PAIR("{'chosen':'abX','rejected':'abY'}", "ab{X$}", "ab{Y$}");
    /* One is the beginning of the other: it ends where the other goes on. */
    PAIR("{'chosen':'ab','rejected':'abc'}", "ab{$}", "ab{c$}");
    /* Transcripts part at the last turn, though the answers begin alike. */
    PAIR("{'chosen':'\\n\\nHuman: a\\n\\nAssistant: b\\n\\nHuman: c\\n\\nAssistant: I do',"
         "'rejected':'\\n\\nHuman: a\\n\\nAssistant: b\\n\\nHuman: c\\n\\nAssistant: I will'}",
         "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:{ I do$}",
         "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:{ I will$}");
    /* Whole conversations: the last turn is the answer. */
    PAIR("{'chosen':[{'role':'user','content':'a'},{'role':'assistant','content':'x'}],"
         "'rejected':[{'role':'user','content':'a'},{'role':'assistant','content':'y'}]}",
         "\n\nHuman: a\n\nAssistant:{ x$}", "\n\nHuman: a\n\nAssistant:{ y$}");
}

/* Two characters that share their first byte are not cut apart. */
TEST(implicit_prompts_end_at_characters) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = train_tok(ctx, 257);
    rlhf_data_config c = rlhf_data_config_default(RLHF_DATA_PREFERENCE);
    rlhf_dataset *d = NULL;
    CHECK(parse(ctx, tok, &c, "{'chosen':'ab\xc3\xa4','rejected':'ab\xc3\xb6'}", &d) == RLHF_OK);
    if (d) {
        const data_seq *s = &d->record[0].a;
        CHECK_EQ_I(s->n, 5); /* a b, two bytes, the end */
        for (int t = 0; t < s->n; t++) CHECK_EQ_I(s->loss[t], t >= 2);
    }
    rlhf_dataset_close(d);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

TEST(prompts_bear_none_and_have_no_end) {
    PROMPT("{'prompt':'Q: x\\nA:','answer':7}", "Q: x\nA:");
    PROMPT("{'prompt':[{'role':'user','content':'a'}]}", "\n\nHuman: a\n\nAssistant:");
    PROMPT("{'prompt':[{'role':'user','content':'a'},{'role':'assistant','content':'b'},"
           "{'role':'user','content':'c'}]}",
           "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:");
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = train_tok(ctx, 257);
    rlhf_data_config c = rlhf_data_config_default(RLHF_DATA_PROMPT);
    rlhf_dataset *d = NULL;
    CHECK(parse(ctx, tok, &c, "{'prompt':[{'role':'user','content':'a'}]}", &d) == RLHF_OK);
    if (d) CHECK_EQ_S(d->record[0].prompt, "\n\nHuman: a\n\nAssistant:");
    rlhf_dataset_close(d);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

TEST(chat_templates_are_chosen) {
    static const char turns[] =
        "{'messages':[{'role':'user','content':'a'},{'role':'assistant','content':'b'},"
        "{'role':'user','content':'c'},{'role':'assistant','content':'d'}]}";
    check_record(__LINE__, with_chat(RLHF_DATA_SFT, "plain"), turns, "a\n{b}\nc\n{d$}", NULL);
    check_record(__LINE__, with_chat(RLHF_DATA_SFT, "hh"), turns,
                 "\n\nHuman: a\n\nAssistant:{ b}\n\nHuman: c\n\nAssistant:{ d$}", NULL);
    check_record(__LINE__, with_chat(RLHF_DATA_SFT, "chatml"), turns,
                 "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{b<|im_end|>}\n"
                 "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n{d<|im_end|>}",
                 NULL);
    check_record(__LINE__, with_chat(RLHF_DATA_SFT, "llama-3"),
                 "{'messages':[{'role':'user','content':' a '},"
                 "{'role':'assistant','content':'b'}]}",
                 "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
                 "<|start_header_id|>assistant<|end_header_id|>\n\n{b<|eot_id|>}",
                 NULL);
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = train_tok(ctx, 257);
    rlhf_data_config c = with_chat(RLHF_DATA_SFT, "klingon");
    rlhf_dataset *d = NULL;
    CHECK(parse(ctx, tok, &c, turns, &d) == RLHF_ERR_ARG);
    CHECK(strstr(rlhf_error(ctx), "klingon") && strstr(rlhf_error(ctx), "chatml"));
    CHECK(d == NULL);
    /* Every name that is offered works. */
    char names[256];
    snprintf(names, sizeof names, "%s", rlhf_chat_templates());
    for (char *name = strtok(names, "|"); name; name = strtok(NULL, "|")) {
        c.chat_template = name;
        if (parse(ctx, tok, &c, turns, &d) != RLHF_OK)
            test_fail(__FILE__, __LINE__, "%s: %s", name, rlhf_error(ctx));
        rlhf_dataset_close(d);
        d = NULL;
    }
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

/* With a real vocabulary: the whole text's tokens, loss from the first that differs from the
 * prompt's, so that a token across the border is learnt. */
TEST(merged_tokens_across_the_border) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = train_tok(ctx, 300);
    rlhf_data_config c = rlhf_data_config_default(RLHF_DATA_SFT);
    rlhf_dataset *d = NULL;
    int32_t ids[64];
    int n = 0, np = 0;
    CHECK(rlhf_encode(tok, "on the", 6, 1, ids, 64, &n) == RLHF_OK);
    CHECK(rlhf_encode(tok, "on th", 5, 1, NULL, 0, &np) == RLHF_OK);
    CHECK(parse(ctx, tok, &c, "{'prompt':'on th','completion':'e'}", &d) == RLHF_OK);
    if (d) {
        const data_seq *s = &d->record[0].a;
        CHECK_EQ_I(s->n, n + 1);
        CHECK(memcmp(s->ids, ids, (size_t)n * sizeof *ids) == 0);
        CHECK_EQ_I(s->ids[n], tok->eos);
        CHECK(s->loss[n] && s->loss[n - 1]);
        CHECK(!s->loss[0]);
    }
    rlhf_dataset_close(d);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

/* ---- what is kept, dropped, counted ---------------------------------------------------------- */

TEST(columns_are_kept) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = train_tok(ctx, 257);
    rlhf_data_config c = rlhf_data_config_default(RLHF_DATA_PREFERENCE);
    rlhf_dataset *d = NULL;
    CHECK(parse(ctx, tok, &c,
                "{'prompt':'p','chosen':'a','rejected':'b','weight':0.25,'margin':1.5,"
                "'domain':'law','annotator':'anna','annotator_type':'expert','extra':[1,2]}\n"
                "\n"
                "  {'prompt':'p','chosen':'a','rejected':'b','domain':null}  \r\n",
                &d) == RLHF_OK);
    REQUIRE(d != NULL);
    CHECK_EQ_I(rlhf_dataset_count(d), 2);
    const data_record *r = d->record;
    CHECK_NEAR(r[0].weight, 0.25, 0);
    CHECK_NEAR(r[0].margin, 1.5, 0);
    CHECK_EQ_S(r[0].domain, "law");
    CHECK_EQ_S(r[0].annotator, "anna");
    CHECK_EQ_S(r[0].annotator_type, "expert");
    CHECK_NEAR(r[1].weight, 1, 0);
    CHECK_NEAR(r[1].margin, 0, 0);
    CHECK(!r[1].domain && !r[1].annotator && !r[1].annotator_type);
    CHECK(strstr(rlhf_dataset_record(d, 0), "\"extra\":[1,2]") != NULL);
    CHECK(!strchr(rlhf_dataset_record(d, 0), '\n'));
    CHECK(!rlhf_dataset_record(d, 2) && !rlhf_dataset_record(d, -1));
    rlhf_dataset_close(d);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

static int warnings;
static char last_warning[512];

static void note_log(void *user, rlhf_level level, const char *text) {
    (void)user;
    if (level != RLHF_LOG_WARNING) return;
    warnings++;
    snprintf(last_warning, sizeof last_warning, "%s", text);
}

TEST(too_long_is_dropped_counted_and_told) {
    rlhf_options options = rlhf_options_default();
    rlhf_ctx *ctx = NULL;
    options.hooks = test_hooks();
    options.hooks.log = note_log;
    options.threads = 1;
    CHECK(rlhf_open(&ctx, &options) == RLHF_OK);
    rlhf_tokenizer *tok = train_tok(ctx, 257);
    rlhf_data_config c = rlhf_data_config_default(RLHF_DATA_SFT);
    rlhf_dataset *d = NULL;
    warnings = 0;
    c.max_length = 5; /* with the end token */
    CHECK(parse(ctx, tok, &c, "{'text':'abcd'}\n{'text':'abcde'}\n{'text':'xy'}\n", &d) == RLHF_OK);
    CHECK_EQ_I(rlhf_dataset_count(d), 2);
    CHECK_EQ_I(rlhf_dataset_dropped(d), 1);
    CHECK_EQ_I(rlhf_dataset_tokens(d), 8);
    CHECK_EQ_I(warnings, 1);
    CHECK(strstr(last_warning, "mem.jsonl: 1 of 3 ") != NULL);
    rlhf_dataset_close(d);
    /* A pair is dropped when either answer is too long. */
    c = rlhf_data_config_default(RLHF_DATA_PREFERENCE);
    c.max_length = 5;
    CHECK(parse(ctx, tok, &c,
                "{'prompt':'a','chosen':'b','rejected':'cdefg'}\n"
                "{'prompt':'a','chosen':'cdefg','rejected':'b'}\n"
                "{'prompt':'a','chosen':'c','rejected':'b'}\n",
                &d) == RLHF_OK);
    CHECK_EQ_I(rlhf_dataset_count(d), 1);
    CHECK_EQ_I(rlhf_dataset_dropped(d), 2);
    rlhf_dataset_close(d);
    d = NULL;
    c = rlhf_data_config_default(RLHF_DATA_SFT);
    c.max_length = 2;
    CHECK(parse(ctx, tok, &c, "{'text':'abcd'}\n", &d) == RLHF_ERR_DATA);
    CHECK(d == NULL);
    CHECK(strstr(rlhf_error(ctx), "mem.jsonl") && strstr(rlhf_error(ctx), "longer"));
    c = rlhf_data_config_default(RLHF_DATA_SFT);
    c.max_records = 2;
    CHECK(parse(ctx, tok, &c, "{'text':'ab'}\n{'text':'cd'}\nnot read any more\n", &d) == RLHF_OK);
    CHECK_EQ_I(rlhf_dataset_count(d), 2);
    rlhf_dataset_close(d);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

/* One array, gzip, no final newline, Windows line ends: the same records. */
TEST(containers) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = train_tok(ctx, 257);
    rlhf_data_config c = rlhf_data_config_default(RLHF_DATA_SFT);
    static const char lines[] = "{\"text\":\"abc\"}\n{\"text\":\"de\"}\n";
    const char *paths[4];
    char gz_path[1024];
    paths[0] = test_write("a.jsonl", lines);
    paths[1] = test_write("b.json", "[\n {\"text\":\"abc\"},\n {\"text\":\"de\"}\n]\n");
    paths[2] = test_write("c.jsonl", "{\"text\":\"abc\"}\r\n\r\n{\"text\":\"de\"}");
    snprintf(gz_path, sizeof gz_path, "%s/d.jsonl.gz", test_dir());
    gzFile gz = gzopen(gz_path, "wb");
    CHECK(gz && gzputs(gz, lines) > 0);
    if (gz) gzclose(gz);
    paths[3] = gz_path;
    for (int i = 0; i < 4; i++) {
        rlhf_dataset *d = NULL;
        if (rlhf_dataset_open(ctx, paths[i], tok, &c, &d) != RLHF_OK)
            test_fail(__FILE__, __LINE__, "%s", rlhf_error(ctx));
        CHECK_EQ_I(rlhf_dataset_count(d), 2);
        if (d) CHECK_EQ_S(marked(ctx, tok, &d->record[0].a), "a{bc$}");
        if (d) CHECK_EQ_S(rlhf_dataset_record(d, 1), "{\"text\":\"de\"}");
        rlhf_dataset_close(d);
    }
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

/* Many records, so that the table grows several times. */
TEST(many_records) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = train_tok(ctx, 257);
    rlhf_data_config c = rlhf_data_config_default(RLHF_DATA_SFT);
    int n = 3000;
    char *text = malloc((size_t)n * 32);
    size_t len = 0;
    for (int i = 0; i < n; i++) len += (size_t)sprintf(text + len, "{\"text\":\"n%d\"}\n", i);
    rlhf_dataset *d = NULL;
    CHECK(rlhf_dataset_parse(ctx, text, len, "many", tok, &c, &d) == RLHF_OK);
    CHECK_EQ_I(rlhf_dataset_count(d), n);
    for (int i = 0; d && i < n; i++) {
        char want[32];
        snprintf(want, sizeof want, "{\"text\":\"n%d\"}", i);
        if (strcmp(want, rlhf_dataset_record(d, i)) == 0) continue;
        CHECK_EQ_S(rlhf_dataset_record(d, i), want);
        break;
    }
    free(text);
    rlhf_dataset_close(d);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

/* ---- what is refused ------------------------------------------------------------------------- */

/* The error's text begins with "mem.jsonl:2: " (a good first line comes before), and holds what. */
static void check_refused(int line, rlhf_data_kind kind, const char *good, const char *bad,
                          const char *what) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = train_tok(ctx, 257);
    rlhf_data_config c = rlhf_data_config_default(kind);
    rlhf_dataset *d = NULL;
    char text[2048];
    snprintf(text, sizeof text, "%s\n%s\n", good, bad);
    rlhf_status status = parse(ctx, tok, &c, text, &d);
    const char *error = rlhf_error(ctx);
    test_eq_i(__FILE__, line, "status", "RLHF_ERR_DATA", status, RLHF_ERR_DATA);
    if (d) test_fail(__FILE__, line, "a dataset in spite of the error");
    if (strncmp(error, "mem.jsonl:2: ", 13))
        test_fail(__FILE__, line, "\"%s\" does not begin with mem.jsonl:2:", error);
    if (!strstr(error, what)) test_fail(__FILE__, line, "\"%s\" does not say %s", error, what);
    if (strchr(error, '\n')) test_fail(__FILE__, line, "\"%s\" has several lines", error);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

#define NO_SFT(bad, what)                                                                          \
    check_refused(__LINE__, RLHF_DATA_SFT, "{'text':'fine'}", bad, quoted(what))
#define NO_PAIR(bad, what)                                                                         \
    check_refused(__LINE__, RLHF_DATA_PREFERENCE, "{'prompt':'p','chosen':'a','rejected':'b'}",    \
                  bad, quoted(what))
#define NO_PROMPT(bad, what)                                                                       \
    check_refused(__LINE__, RLHF_DATA_PROMPT, "{'prompt':'p'}", bad, quoted(what))

TEST(unusable_records) {
    NO_SFT("{'txt':'abc'}", "'text'");
    NO_SFT("{'text':5}", "'text': found 5, expected a string");
    NO_SFT("{'prompt':'abc'}", "missing 'completion'");
    NO_SFT("{'prompt':1,'completion':'a'}", "'prompt': found 1");
    NO_SFT("{'prompt':'a','completion':{}}", "'completion': found an object");
    NO_SFT("{'messages':'abc'}", "'messages'");
    NO_SFT("{'messages':[]}", "assistant");
    NO_SFT("{'messages':[{'role':'user','content':'a'}]}", "assistant");
    NO_SFT("{'messages':[{'role':'user'},{'role':'assistant','content':'b'}]}", "'content'");
    NO_SFT("{'messages':[{'content':'a'},{'role':'assistant','content':'b'}]}", "'role'");
    NO_SFT("{'messages':[{'role':'robot','content':'a'},{'role':'assistant','content':'b'}]}",
           "'robot', expected system, user or assistant");
    NO_SFT("{'messages':['a']}", "'messages': found 'a'");
    NO_SFT("['text']", "expected an object");
    NO_SFT("7", "expected an object");
    NO_SFT("{'text':'abc'", "bad JSON");
    NO_SFT("{'text':'abc'} {}", "bad JSON");
    NO_SFT("{'text':'a','weight':-1}", "'weight'");
    NO_SFT("{'text':'a','weight':'much'}", "'weight': found 'much', expected a number");
    NO_SFT("{'text':'a','domain':3}", "'domain': found 3, expected a string");
    NO_PAIR("{'prompt':'p','rejected':'b'}", "missing 'chosen'");
    NO_PAIR("{'prompt':'p','chosen':'b'}", "missing 'rejected'");
    NO_PAIR("{'prompt':'p','chosen':'a','rejected':3}", "'rejected': found 3");
    NO_PAIR("{'prompt':true,'chosen':'a','rejected':'b'}", "'prompt': found true");
    NO_PAIR("{'prompt':'p','chosen':'a','rejected':'b','margin':[]}", "'margin'");
    NO_PROMPT("{'text':'p'}", "missing 'prompt'");
    NO_PROMPT("{'prompt':3}", "'prompt': found 3");
    NO_PROMPT("{'prompt':''}", "no tokens");
}

TEST(unusable_files) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = train_tok(ctx, 257);
    rlhf_data_config c = rlhf_data_config_default(RLHF_DATA_SFT);
    rlhf_dataset *d = NULL;
    CHECK(rlhf_dataset_open(ctx, "/nowhere/x.jsonl", tok, &c, &d) == RLHF_ERR_IO);
    CHECK(strstr(rlhf_error(ctx), "/nowhere/x.jsonl: ") != NULL);
    CHECK(rlhf_dataset_open(ctx, test_dir(), tok, &c, &d) == RLHF_ERR_IO);
    CHECK(rlhf_dataset_open(ctx, test_write("empty.jsonl", ""), tok, &c, &d) == RLHF_ERR_DATA);
    CHECK(strstr(rlhf_error(ctx), "empty.jsonl: no records") != NULL);
    CHECK(rlhf_dataset_open(ctx, test_write("blank.jsonl", "\n \n"), tok, &c, &d) == RLHF_ERR_DATA);
    CHECK(parse(ctx, tok, &c, "[{'text':'a'},{'txt':'b'}]", &d) == RLHF_ERR_DATA);
    CHECK(strstr(rlhf_error(ctx), "mem.jsonl") != NULL);
    CHECK(parse(ctx, tok, &c, "[{'text':'a'},\n{'text':'b'}\n,]", &d) == RLHF_ERR_DATA);
    CHECK(strstr(rlhf_error(ctx), "mem.jsonl:3: bad JSON") != NULL);
    /* A gzip file that ends in the middle. */
    char path[1024];
    snprintf(path, sizeof path, "%s/cut.jsonl.gz", test_dir());
    gzFile gz = gzopen(path, "wb");
    for (int i = 0; gz && i < 500; i++) gzprintf(gz, "{\"text\":\"number %d\"}\n", i * i * 7919);
    if (gz) gzclose(gz);
    struct stat st;
    CHECK(stat(path, &st) == 0 && truncate(path, st.st_size / 2) == 0);
    CHECK(rlhf_dataset_open(ctx, path, tok, &c, &d) == RLHF_ERR_IO);
    CHECK(strstr(rlhf_error(ctx), "cut.jsonl.gz: the gzip data is damaged") != NULL);
    CHECK(d == NULL);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

/* In an array, the place is the record's index. */
TEST(errors_in_arrays_name_the_record) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = train_tok(ctx, 257);
    rlhf_data_config c = rlhf_data_config_default(RLHF_DATA_SFT);
    rlhf_dataset *d = NULL;
    CHECK(parse(ctx, tok, &c, "[{'text':'a'},{'txt':'b'}]", &d) == RLHF_ERR_DATA);
    if (!strstr(rlhf_error(ctx), "1")) test_fail(__FILE__, __LINE__, "%s", rlhf_error(ctx));
    CHECK(parse(ctx, tok, &c, "[{'text':'a'},{'text':9}]", &d) == RLHF_ERR_DATA);
    if (!strstr(rlhf_error(ctx), "[1]")) test_fail(__FILE__, __LINE__, "%s", rlhf_error(ctx));
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

/* ---- further forms --------------------------------------------------------------------------- */

/* A file of several records: how many are usable and how many dropped. */
static rlhf_dataset *open_lines(int line, rlhf_ctx *ctx, rlhf_tokenizer *tok, rlhf_data_kind kind,
                                const char *text, int n, int dropped) {
    rlhf_data_config c = rlhf_data_config_default(kind);
    rlhf_dataset *d = NULL;
    if (parse(ctx, tok, &c, text, &d) != RLHF_OK)
        test_fail(__FILE__, line, "%s: %s", text, rlhf_error(ctx));
    test_eq_i(__FILE__, line, "records", "expected", rlhf_dataset_count(d), n);
    test_eq_i(__FILE__, line, "dropped", "expected", rlhf_dataset_dropped(d), dropped);
    return d;
}

TEST(sharegpt) {
    static const char talk[] = "{'conversations':[{'from':'human','value':'a'},{'from':'gpt',"
                               "'value':'b'},{'from':'human','value':'c'},{'from':'gpt',"
                               "'value':'d'}],'system':'s'}";
    SFT(talk, "\n\nSystem: s\n\nHuman: a\n\nAssistant:{ b}\n\nHuman: c\n\nAssistant:{ d$}");
    PROMPT(talk, "\n\nSystem: s\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:");
    /* A system turn of its own, and the other convention's names. */
    SFT("{'conversations':[{'from':'system','value':'s'},{'role':'user','content':'a'},"
        "{'from':'gpt','value':'b'}]}",
        "\n\nSystem: s\n\nHuman: a\n\nAssistant:{ b$}");
    PAIR("{'conversations':[{'from':'human','value':'a'}],'chosen':{'from':'gpt','value':'x'},"
         "'rejected':{'from':'gpt','value':'y'}}",
         "\n\nHuman: a\n\nAssistant:{ x$}", "\n\nHuman: a\n\nAssistant:{ y$}");
    SFT("{'conversations':[{'from':'human','value':'a'}],'chosen':{'from':'gpt','value':'x'},"
        "'rejected':{'from':'gpt','value':'y'}}",
        "\n\nHuman: a\n\nAssistant:{ x$}");
    NO_SFT("{'conversations':[{'from':'alien','value':'a'}]}", "'from': found 'alien'");
    NO_SFT("{'conversations':['a']}", "'conversations': found 'a'");
    NO_SFT("{'conversations':7}", "'conversations': found 7");
}

TEST(alpaca) {
    SFT("{'instruction':'do','input':'','output':'x'}", "\n\nHuman: do\n\nAssistant:{ x$}");
    SFT("{'instruction':'do','input':'it','output':'x','text':'all'}",
        "\n\nHuman: do\nit\n\nAssistant:{ x$}");
    SFT("{'instruction':'do','output':'x','system':'s','history':[['a','b']]}",
        "\n\nSystem: s\n\nHuman: a\n\nAssistant: b\n\nHuman: do\n\nAssistant:{ x$}");
    PROMPT("{'instruction':'do','input':'it','output':'x'}", "\n\nHuman: do\nit\n\nAssistant:");
    PAIR("{'instruction':'do','chosen':'x','rejected':'y'}", "\n\nHuman: do\n\nAssistant:{ x$}",
         "\n\nHuman: do\n\nAssistant:{ y$}");
    NO_SFT("{'instruction':5,'output':'x'}", "'instruction': found 5");
    NO_SFT("{'instruction':'do'}", "missing 'output'");
    NO_SFT("{'instruction':'do','output':'x','history':[['a']]}", "'history'");
}

/* Transcripts and conversations without a prompt: what they share is it. */
TEST(prompts_of_answers) {
    static const char hh[] = "{'chosen':'\\n\\nHuman: a\\n\\nAssistant: I do',"
                             "'rejected':'\\n\\nHuman: a\\n\\nAssistant: I will'}";
    static const char turns[] =
        "{'chosen':[{'role':'user','content':'a'},{'role':'assistant','content':'x'}],"
        "'rejected':[{'role':'user','content':'a'},{'role':'assistant','content':'y'}]}";
    PROMPT(hh, "\n\nHuman: a\n\nAssistant:");
    SFT(hh, "\n\nHuman: a\n\nAssistant:{ I do$}");
    PROMPT(turns, "\n\nHuman: a\n\nAssistant:");
    SFT(turns, "\n\nHuman: a\n\nAssistant:{ x$}");
    PROMPT("{'messages':[{'role':'user','content':'a'},{'role':'assistant','content':'b'}]}",
           "\n\nHuman: a\n\nAssistant:");
    PROMPT("{'messages':[{'role':'user','content':'a'}],'answer':3}", "\n\nHuman: a\n\nAssistant:");
    /* A prompt beside whole conversations is said twice. */
    PAIR("{'prompt':'a','chosen':[{'role':'user','content':'a'},{'role':'assistant',"
         "'content':'x'}],'rejected':[{'role':'user','content':'a'},{'role':'assistant',"
         "'content':'y'}],'messages':[]}",
         "\n\nHuman: a\n\nAssistant:{ x$}", "\n\nHuman: a\n\nAssistant:{ y$}");
    NO_PROMPT("{'chosen':'x','rejected':'y'}", "missing 'prompt'");
}

TEST(rankings) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = train_tok(ctx, 257);
    static const char four[] = "{'prompt':'p','responses':['a','b','c','d'],'ranking':[2,1,3,3],"
                               "'weight':2}\n{'prompt':'p','responses':['e','f'],'best':1}\n"
                               "{'prompt':'q','responses':['g','h'],'ranking':[1,1]}\n";
    static const char *const pairs[][2] = {{"p{a$}", "p{c$}"}, {"p{a$}", "p{d$}"},
                                           {"p{b$}", "p{a$}"}, {"p{b$}", "p{c$}"},
                                           {"p{b$}", "p{d$}"}, {"p{f$}", "p{e$}"}};
    rlhf_dataset *d = open_lines(__LINE__, ctx, tok, RLHF_DATA_PREFERENCE, four, 6, 1);
    for (int i = 0; d && i < d->n; i++) {
        CHECK_EQ_S(marked(ctx, tok, &d->record[i].a), pairs[i][0]);
        CHECK_EQ_S(marked(ctx, tok, &d->record[i].b), pairs[i][1]);
        CHECK_NEAR(d->record[i].weight, i < 5 ? 2.0 / 5 : 1, 1e-12);
    }
    rlhf_dataset_close(d);
    d = open_lines(__LINE__, ctx, tok, RLHF_DATA_SFT, four, 3, 0);
    if (d) CHECK_EQ_S(marked(ctx, tok, &d->record[0].a), "p{b$}");
    if (d) CHECK_EQ_S(marked(ctx, tok, &d->record[1].a), "p{f$}");
    rlhf_dataset_close(d);
    PROMPT("{'prompt':'p','responses':['a','b'],'best':0}", "p");
    /* What is too long takes its pairs with it; the others share the weight. */
    rlhf_data_config c = rlhf_data_config_default(RLHF_DATA_PREFERENCE);
    c.max_length = 4;
    OK(ctx, parse(ctx, tok, &c,
                  "{'prompt':'p','responses':['a','bbbb','c'],'ranking':[1,2,3]}", &d));
    CHECK_EQ_I(rlhf_dataset_count(d), 1);
    CHECK_EQ_I(rlhf_dataset_dropped(d), 2);
    if (d) CHECK_NEAR(d->record[0].weight, 1, 0);
    rlhf_dataset_close(d);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
    NO_PAIR("{'prompt':'p','responses':['a','b']}", "'ranking' or the 'best'");
    NO_PAIR("{'prompt':'p','responses':['a','b'],'best':2}", "'best': found 2");
    NO_PAIR("{'prompt':'p','responses':['a','b'],'ranking':[1]}", "'ranking'");
    NO_PAIR("{'prompt':'p','responses':['a'],'best':0}", "'responses': found an array, expected 2");
    NO_PAIR("{'prompt':'p','responses':['a',4],'best':0}", "'responses': found 4");
    NO_PAIR("{'responses':['a','b','c'],'best':0}", "missing 'prompt'");
}

TEST(labels) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = train_tok(ctx, 257);
    static const char loose[] = "{'prompt':'p','completion':'a','label':true}\n"
                                "{'prompt':'q','completion':'b','label':true}\n"
                                "{'prompt':'p','completion':'c','label':false,'weight':3}\n"
                                "{'prompt':'p','completion':'d','label':1,'domain':'law'}\n"
                                "{'prompt':'x','chosen':'y','rejected':'z'}\n";
    rlhf_dataset *d = open_lines(__LINE__, ctx, tok, RLHF_DATA_PREFERENCE, loose, 3, 1);
    if (d && d->n == 3) {
        CHECK_EQ_S(marked(ctx, tok, &d->record[0].a), "x{y$}");
        CHECK_EQ_S(marked(ctx, tok, &d->record[1].a), "p{a$}");
        CHECK_EQ_S(marked(ctx, tok, &d->record[1].b), "p{c$}");
        CHECK_EQ_S(marked(ctx, tok, &d->record[2].a), "p{d$}");
        CHECK_EQ_S(d->record[2].domain, "law");
        CHECK_NEAR(d->record[1].weight, 0.5, 0);
        CHECK_NEAR(d->record[2].weight, 0.5, 0);
    }
    rlhf_dataset_close(d);
    d = open_lines(__LINE__, ctx, tok, RLHF_DATA_SFT, loose, 4, 1);
    rlhf_dataset_close(d);
    /* Conversations with a label: the last turn is the answer. */
    d = open_lines(__LINE__, ctx, tok, RLHF_DATA_PREFERENCE,
                   "[{'messages':[{'role':'user','content':'a'},{'role':'assistant','content':'b'}]"
                   ",'label':false},{'conversations':[{'from':'human','value':'a'},{'from':'gpt',"
                   "'value':'c'}],'label':true}]",
                   1, 0);
    if (d) CHECK_EQ_S(marked(ctx, tok, &d->record[0].a), "\n\nHuman: a\n\nAssistant:{ c$}");
    rlhf_dataset_close(d);
    /* Nothing to pair: which stages can use them. */
    rlhf_data_config c = rlhf_data_config_default(RLHF_DATA_PREFERENCE);
    CHECK(parse(ctx, tok, &c, "{'prompt':'q','completion':'b','label':true}", &d) == RLHF_ERR_DATA);
    CHECK(strstr(rlhf_error(ctx), "other label") && strstr(rlhf_error(ctx), "fine-tuning"));
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
    NO_PAIR("{'prompt':'p','completion':'a'}", "'label'");
    NO_SFT("{'prompt':'p','completion':'a','label':'good'}", "'label': found 'good'");
    NO_SFT("{'prompt':'p','completion':'a','label':2}", "'label': found 2");
}

/* Every allocation of a file with each form may fail. */
TEST(forms_give_back_what_they_took) {
    static const char text[] =
        "{'instruction':'do','input':'it','chosen':'x','rejected':'y','history':[['a','b']]}\n"
        "{'prompt':'p','responses':['a','b','c'],'ranking':[2,1,3]}\n"
        "{'prompt':'p','completion':'a','label':true}\n"
        "{'prompt':'p','completion':'b','label':false}\n"
        "{'prompt':'q','completion':'b','label':false}\n";
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = train_tok(ctx, 257);
    rlhf_data_config c = rlhf_data_config_default(RLHF_DATA_PREFERENCE);
    for (int64_t n = 0; test_next_oom(&n);) {
        rlhf_dataset *d = NULL;
        int64_t before = test_live();
        rlhf_status status = parse(ctx, tok, &c, text, &d);
        CHECK(status == RLHF_OK ? d != NULL : status == RLHF_ERR_MEMORY && !d);
        rlhf_dataset_close(d);
        if (status) CHECK_EQ_I(test_live(), before);
    }
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

TEST_MAIN(CASE(text_bears_loss_everywhere), CASE(completions_bear_loss),
          CASE(every_assistant_turn_bears_loss), CASE(lists_of_turns_as_prompt_and_completion),
          CASE(assistant_turns_of_a_prompt_bear_none), CASE(preferences_with_a_prompt),
          CASE(preferences_without_a_prompt), CASE(implicit_prompts_end_at_characters),
          CASE(prompts_bear_none_and_have_no_end), CASE(chat_templates_are_chosen),
          CASE(merged_tokens_across_the_border), CASE(columns_are_kept),
          CASE(too_long_is_dropped_counted_and_told), CASE(containers), CASE(many_records),
          CASE(unusable_records), CASE(unusable_files), CASE(errors_in_arrays_name_the_record),
          CASE(sharegpt), CASE(alpaca), CASE(prompts_of_answers), CASE(rankings), CASE(labels),
          CASE(forms_give_back_what_they_took))
