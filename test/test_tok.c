/* Files, JSON and tokenizers. The golden ids come from Hugging Face's tokenizers library. */

#include "../rlhf.c"
#include "test.h"

static rlhf_ctx *tt_open(void) {
    rlhf_options options = rlhf_options_default();
    options.threads = 1;
    options.hooks = test_hooks();
    rlhf_ctx *ctx = NULL;
    if (rlhf_open(&ctx, &options) != RLHF_OK) test_fail(__FILE__, __LINE__, "no context");
    return ctx;
}

static rlhf_tokenizer *tt_load(rlhf_ctx *ctx, const char *path) {
    rlhf_tokenizer *t = NULL;
    if (rlhf_tokenizer_open(ctx, path, &t) != RLHF_OK)
        test_fail(__FILE__, __LINE__, "%s", rlhf_error(ctx));
    return t;
}

/* Ids of a text as "1 2 3", in one of four rotating buffers. */
static const char *tt_ids(rlhf_tokenizer *t, const char *text, size_t len, int special) {
    static char out[4][8192];
    static int next;
    static int32_t ids[2000];
    char *p = out[next++ % 4];
    int n = 0, at = 0;
    *p = 0;
    if (rlhf_encode(t, text, len, special, ids, 2000, &n) != RLHF_OK) return "(failed)";
    for (int i = 0; i < n && i < 2000 && at < 8000; i++)
        at += snprintf(p + at, 8192 - (size_t)at, i ? " %d" : "%d", (int)ids[i]);
    return p;
}

/* Decodes what a text is encoded to: whether the same bytes come back. */
static int tt_round(rlhf_ctx *ctx, rlhf_tokenizer *t, const char *text, size_t len) {
    static int32_t ids[4096];
    int n = 0;
    char *back = NULL;
    size_t m = 0;
    if (rlhf_encode(t, text, len, 0, ids, 4096, &n) != RLHF_OK || n > 4096) return 0;
    if (rlhf_decode(t, ids, n, 0, &back, &m) != RLHF_OK) return 0;
    int same = m == len && memcmp(back, text, len) == 0 && back[m] == 0;
    rlhf_free(ctx, back);
    return same;
}

static const char tt_text[] =
    "The cat sat on the mat. The cat saw the other cat, and the other cat sat on the other mat.\n"
    "That is that: the end of the cats' tale, don't you think? 2024 + 2024 = 4048.\n";

static rlhf_tokenizer *tt_train(rlhf_ctx *ctx, const char *text, int size) {
    rlhf_tokenizer *t = NULL;
    size_t len = strlen(text);
    if (rlhf_tokenizer_train(ctx, &text, &len, 1, size, &t) != RLHF_OK)
        test_fail(__FILE__, __LINE__, "%s", rlhf_error(ctx));
    return t;
}

/* ---- golden vectors -------------------------------------------------------------------------- */

static int tt_same_ids(const json_t *want, const int32_t *ids, int n) {
    if ((int)json_array_size(want) != n) return 0;
    for (int i = 0; i < n; i++)
        if (json_integer_value(json_array_get(want, (size_t)i)) != ids[i]) return 0;
    return 1;
}

static void tt_golden_one(rlhf_ctx *ctx, rlhf_tokenizer *t, const char *name, const json_t *string,
                          const json_t *want) {
    static int32_t ids[4096];
    const char *text = json_string_value(string);
    size_t len = json_string_length(string), m = 0;
    for (int special = 1; special >= 0; special--) {
        int n = -1;
        CHECK_EQ_I(rlhf_encode(t, text, len, special, ids, 4096, &n), RLHF_OK);
        if (!tt_same_ids(json_object_get(want, special ? "ids_special" : "ids"), ids, n))
            test_fail(__FILE__, __LINE__, "%s: \"%s\" (special %d) has other ids", name, text,
                      special);
        char *back = NULL;
        CHECK_EQ_I(rlhf_decode(t, ids, n, special, &back, &m), RLHF_OK);
        const json_t *decoded = json_object_get(want, "decoded");
        if (!special && (m != json_string_length(decoded) ||
                         memcmp(back, json_string_value(decoded), m) != 0))
            test_fail(__FILE__, __LINE__, "%s: \"%s\" decodes to \"%s\"", name, text, back);
        rlhf_free(ctx, back);
    }
}

static void tt_golden(const char *name) {
    char dir[128];
    snprintf(dir, sizeof dir, "tokenizers/%s", name);
    const char *path = test_asset(dir), *golden = test_asset("tokenizers/golden_vectors.json");
    if (!path || !golden) SKIP("no ../shared/assets");
    json_t *root = json_load_file(golden, JSON_ALLOW_NUL, NULL);
    REQUIRE(root);
    const json_t *strings = json_object_get(root, "strings");
    const json_t *model = json_object_get(json_object_get(root, "models"), name);
    const json_t *results = json_object_get(model, "results");
    rlhf_ctx *ctx = tt_open();
    rlhf_tokenizer *t = tt_load(ctx, path);
    CHECK(json_array_size(strings) > 0);
    CHECK_EQ_I(json_array_size(strings), json_array_size(results));
    if (t) CHECK_EQ_I(rlhf_tokenizer_vocab_size(t),
                      json_integer_value(json_object_get(model, "vocab_size")));
    for (size_t i = 0; t && i < json_array_size(strings); i++)
        tt_golden_one(ctx, t, name, json_array_get(strings, i), json_array_get(results, i));
    rlhf_tokenizer_close(t);
    rlhf_close(ctx);
    json_decref(root);
}

TEST(golden_gpt2) { tt_golden("gpt2"); }
TEST(golden_qwen) { tt_golden("qwen2.5"); }
TEST(golden_llama3) { tt_golden("llama-3.2"); }
TEST(golden_llama2) { tt_golden("llama2"); }
TEST(golden_mistral) { tt_golden("mistral-v0.3"); }

/* ---- chat templates -------------------------------------------------------------------------- */

/* chat_render as a public call would do it; null if it failed. */
static char *tt_render(rlhf_tokenizer *t, const char *template, const chat_message *messages, int n,
                       int generate, chat_span *spans, int *n_spans) {
    err_frame frame;
    char *text = NULL;
    mem_enter(t->ctx, &frame);
    if (setjmp(frame.jump)) {
        mem_leave(t->ctx, 1);
        return NULL;
    }
    text = chat_render(t, template, messages, n, generate, spans, n_spans);
    mem_leave(t->ctx, 0);
    return text;
}

static void tt_chat(const char *name, const char *dir) {
    const char *path = test_asset(dir);
    const char *golden = test_asset("tokenizers/chat_template_golden.json");
    if (!path || !golden) SKIP("no ../shared/assets");
    json_t *root = json_load_file(golden, 0, NULL);
    REQUIRE(root);
    chat_message m[8];
    const json_t *messages = json_object_get(root, "messages"), *v;
    int n = 0;
    for (size_t i = 0; i < json_array_size(messages) && n < 8; i++) {
        v = json_array_get(messages, i);
        m[n++] = (chat_message){json_string_value(json_object_get(v, "role")),
                               json_string_value(json_object_get(v, "content"))};
    }
    rlhf_ctx *ctx = tt_open();
    rlhf_tokenizer *t = tt_load(ctx, path);
    for (int i = 0; t && i < 4; i++) {
        char key[64];
        snprintf(key, sizeof key, "%s:%s:gen=%s", name, i & 1 ? "nosys" : "sys",
                 i & 2 ? "true" : "false");
        const json_t *rendered = json_object_get(root, "rendered");
        const char *want = json_string_value(json_object_get(rendered, key));
        char *got = tt_render(t, "auto", m + (i & 1), n - (i & 1), i >> 1, NULL, NULL);
        CHECK(want);
        CHECK_EQ_S(got, want);
        rlhf_free(ctx, got);
    }
    rlhf_tokenizer_close(t);
    rlhf_close(ctx);
    json_decref(root);
}

TEST(chat_qwen) { tt_chat("qwen2.5", "tokenizers/qwen2.5"); }
TEST(chat_llama3) { tt_chat("llama-3.2", "tokenizers/llama-3.2"); }

static const chat_message tt_talk[] = {
    {"user", "Hi"}, {"assistant", "Hello"}, {"user", "2+2?"}, {"assistant", "4"}};

TEST(chat_spans_cover_answers_and_ends) {
    static const struct { const char *name, *first, *last; } want[] = {
        {"plain", "Hello", "4"},
        {"hh", " Hello", " 4"},
        {"chatml", "Hello<|im_end|>", "4<|im_end|>"},
        {"llama-3", "Hello<|eot_id|>", "4<|eot_id|>"}};
    rlhf_ctx *ctx = tt_open();
    rlhf_tokenizer *t = tt_train(ctx, tt_text, 257);
    for (int i = 0; i < 4; i++) {
        chat_span s[4];
        int n = 0;
        char *text = tt_render(t, want[i].name, tt_talk, 4, 0, s, &n);
        REQUIRE(text);
        CHECK_EQ_I(n, 2);
        CHECK(s[0].end - s[0].start == strlen(want[i].first));
        CHECK(memcmp(text + s[0].start, want[i].first, strlen(want[i].first)) == 0);
        CHECK(s[1].end - s[1].start == strlen(want[i].last));
        CHECK(memcmp(text + s[1].start, want[i].last, strlen(want[i].last)) == 0);
        /* What is generated from is what the answer is appended to in training. */
        char *prompt = tt_render(t, want[i].name, tt_talk, 3, 1, NULL, NULL);
        CHECK_EQ_I(strlen(prompt), s[1].start);
        CHECK(memcmp(prompt, text, s[1].start) == 0);
        rlhf_free(ctx, text);
        rlhf_free(ctx, prompt);
    }
    char *hh = tt_render(t, "auto", tt_talk, 4, 0, NULL, NULL);
    CHECK_EQ_S(hh, "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2+2?\n\nAssistant: 4");
    rlhf_free(ctx, hh);
    rlhf_tokenizer_close(t);
    rlhf_close(ctx);
}

TEST(chat_unknown_template_names_the_choices) {
    rlhf_ctx *ctx = tt_open();
    rlhf_tokenizer *t = tt_train(ctx, tt_text, 257);
    REQUIRE(t);
    CHECK_EQ_I(rlhf_tokenizer_save(t, test_dir()), RLHF_OK);
    rlhf_tokenizer_close(t);
    test_write("chat_template.jinja", "{% for m in messages %}[{{ m.content }}]{% endfor %}");
    t = tt_load(ctx, test_dir());
    REQUIRE(t);
    CHECK(!tt_render(t, "auto", tt_talk, 2, 0, NULL, NULL));
    CHECK_EQ_I(ctx->status, RLHF_ERR_UNSUPPORTED);
    CHECK(strstr(rlhf_error(ctx), "plain|hh|chatml"));
    CHECK(!tt_render(t, "nonsense", tt_talk, 2, 0, NULL, NULL));
    CHECK_EQ_I(ctx->status, RLHF_ERR_ARG);
    chat_message robot = {"robot", "x"};
    CHECK(!tt_render(t, "chatml", &robot, 1, 0, NULL, NULL));
    CHECK_EQ_I(ctx->status, RLHF_ERR_DATA);
    rlhf_tokenizer_close(t);
    rlhf_close(ctx);
}

/* ---- training -------------------------------------------------------------------------------- */

/* The merges and ids are those of Hugging Face's BpeTrainer (min_frequency 2) on the same text. */
TEST(training_matches_the_reference) {
    rlhf_ctx *ctx = tt_open();
    rlhf_tokenizer *t = tt_train(ctx, tt_text, 270);
    REQUIRE(t);
    CHECK_EQ_I(rlhf_tokenizer_vocab_size(t), 270);
    CHECK_EQ_I(rlhf_tokenizer_eos(t), 269);
    CHECK_EQ_S(tt_ids(t, "The cat sat on the other mat.", 29, 0),
               "51 257 262 263 256 259 77 260 266 220 76 256 13");
    CHECK_EQ_S(tt_ids(t, "!~ \n<|endoftext|>\xC3\xA9", 19, 1), "0 93 220 198 269 127 102");
    rlhf_tokenizer_close(t);
    rlhf_close(ctx);
}

TEST(training_is_deterministic_and_saved_whole) {
    rlhf_ctx *ctx = tt_open();
    rlhf_tokenizer *a = tt_train(ctx, tt_text, 290), *b = tt_train(ctx, tt_text, 290), *c = NULL;
    REQUIRE(a && b);
    CHECK_EQ_I(a->json_len, b->json_len);
    CHECK(memcmp(a->json, b->json, a->json_len) == 0);
    CHECK_EQ_I(rlhf_tokenizer_save(a, test_dir()), RLHF_OK);
    c = tt_load(ctx, test_dir());
    REQUIRE(c);
    CHECK_EQ_I(rlhf_tokenizer_eos(c), rlhf_tokenizer_eos(a));
    CHECK_EQ_I(rlhf_tokenizer_bos(c), rlhf_tokenizer_bos(a));
    static const char *const strings[] = {"", "the cats' tale", "  2024\n\n<|endoftext|> x",
                                          "\xE2\x98\x83"};
    for (int i = 0; i < 4; i++)
        CHECK_EQ_S(tt_ids(c, strings[i], strlen(strings[i]), 1),
                   tt_ids(a, strings[i], strlen(strings[i]), 1));
    rlhf_tokenizer_close(a);
    rlhf_tokenizer_close(b);
    rlhf_tokenizer_close(c);
    rlhf_close(ctx);
}

TEST(training_stops_when_nothing_repeats) {
    rlhf_ctx *ctx = tt_open();
    rlhf_tokenizer *t = tt_train(ctx, "abcdefg", 1000);
    REQUIRE(t);
    CHECK_EQ_I(rlhf_tokenizer_vocab_size(t), 257);
    CHECK_EQ_I(rlhf_tokenizer_eos(t), 256);
    rlhf_tokenizer_close(t);
    t = NULL;
    size_t len = 1;
    const char *text = "a";
    CHECK_EQ_I(rlhf_tokenizer_train(ctx, &text, &len, 1, 256, &t), RLHF_ERR_ARG);
    rlhf_close(ctx);
}

/* ---- round trips ----------------------------------------------------------------------------- */

/* Random characters, runs of one, white space and special tokens. */
static size_t tt_random(char *out, size_t room) {
    static const char *const special[] = {"<|endoftext|>", " the", "\n\n", "   ", "'s", "2024"};
    size_t n = 0;
    for (int k = (int)test_int(0, 20); k > 0 && n + 64 < room; k--) {
        int64_t kind = test_int(0, 3);
        if (kind == 0) n += (size_t)snprintf(out + n, room - n, "%s", special[test_int(0, 5)]);
        else {
            static const uint32_t top[] = {0x7F, 0x2FFF, 0x10FFFF};
            uint32_t cp = (uint32_t)test_int(0, top[kind - 1]);
            if (cp >= 0xD800 && cp < 0xE000) cp = 0xFFFD;
            for (int64_t i = test_int(1, 12); i > 0; i--) n += (size_t)tok_put_char(out + n, cp);
        }
    }
    return n;
}

TEST(any_text_comes_back) {
    rlhf_ctx *ctx = tt_open();
    rlhf_tokenizer *t = tt_train(ctx, tt_text, 290);
    REQUIRE(t);
    static char text[2048];
    for (int i = 0; i < (test_quick() ? 200 : 5000); i++) {
        size_t n = tt_random(text, sizeof text);
        CHECK(tt_round(ctx, t, text, n));
    }
    rlhf_tokenizer_close(t);
    rlhf_close(ctx);
}

/* Python's "a\xffb".decode("utf-8", "replace") and the like. */
TEST(bad_utf8_becomes_replacement_characters) {
    static const struct { const char *in; size_t n; const char *out; } cases[] = {
        {"a\xFF" "b", 3, "a\xEF\xBF\xBD" "b"},
        {"\xE2\x98", 2, "\xEF\xBF\xBD"},
        {"\xE2\x98" "A", 3, "\xEF\xBF\xBD" "A"},
        {"\xC0\xAF", 2, "\xEF\xBF\xBD\xEF\xBF\xBD"},
        {"\xED\xA0\x80", 3, "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"},
        {"\xF0\x9F\x98x", 4, "\xEF\xBF\xBDx"},
        {"\xF4\x90\x80\x80", 4, "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"},
    };
    rlhf_ctx *ctx = tt_open();
    rlhf_tokenizer *t = tt_train(ctx, tt_text, 257);
    REQUIRE(t);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        CHECK_EQ_S(tt_ids(t, cases[i].in, cases[i].n, 0),
                   tt_ids(t, cases[i].out, strlen(cases[i].out), 0));
    /* Bytes that are no text when decoded: the id of byte 0xFF alone. */
    int32_t id = t->byte_id[0xFF];
    char *back = NULL;
    CHECK_EQ_I(rlhf_decode(t, &id, 1, 0, &back, NULL), RLHF_OK);
    CHECK_EQ_S(back, "\xEF\xBF\xBD");
    rlhf_free(ctx, back);
    rlhf_tokenizer_close(t);
    rlhf_close(ctx);
}

TEST(encode_with_no_room_measures) {
    rlhf_ctx *ctx = tt_open();
    rlhf_tokenizer *t = tt_train(ctx, tt_text, 257);
    REQUIRE(t);
    int32_t ids[2] = {-5, -5};
    int n = 0;
    CHECK_EQ_I(rlhf_encode(t, "abc", 3, 0, ids, 0, &n), RLHF_OK);
    CHECK_EQ_I(n, 3);
    CHECK_EQ_I(ids[0], -5);
    CHECK_EQ_I(rlhf_encode(t, "abc", 3, 0, ids, 1, &n), RLHF_OK);
    CHECK_EQ_I(n, 3);
    CHECK_EQ_I(ids[0], t->byte_id['a']);
    CHECK_EQ_I(ids[1], -5);
    rlhf_tokenizer_close(t);
    rlhf_close(ctx);
}

/* ---- a small SentencePiece-style file -------------------------------------------------------- */

static const char tt_sp[] =
    "{\"added_tokens\": [\n"
    " {\"id\": 0, \"content\": \"<unk>\", \"special\": true, \"normalized\": false},\n"
    " {\"id\": 1, \"content\": \"<s>\", \"special\": true, \"normalized\": false},\n"
    " {\"id\": 2, \"content\": \"</s>\", \"special\": true, \"normalized\": false}],\n"
    " \"normalizer\": {\"type\": \"Sequence\", \"normalizers\": [\n"
    "  {\"type\": \"Prepend\", \"prepend\": \"\xE2\x96\x81\"},\n"
    "  {\"type\": \"Replace\", \"pattern\": {\"String\": \" \"},\n"
    "   \"content\": \"\xE2\x96\x81\"}]},\n"
    " \"post_processor\": {\"type\": \"TemplateProcessing\",\n"
    "  \"single\": [{\"SpecialToken\": {\"id\": \"<s>\"}}, {\"Sequence\": {\"id\": \"A\"}}],\n"
    "  \"special_tokens\": {\"<s>\": {\"ids\": [1]}}},\n"
    " \"decoder\": {\"type\": \"Sequence\", \"decoders\": [\n"
    "  {\"type\": \"Replace\", \"pattern\": {\"String\": \"\xE2\x96\x81\"}, \"content\": \" \"},\n"
    "  {\"type\": \"ByteFallback\"}, {\"type\": \"Fuse\"},\n"
    "  {\"type\": \"Strip\", \"content\": \" \", \"start\": 1, \"stop\": 0}]},\n"
    " \"model\": {\"type\": \"BPE\", \"unk_token\": \"<unk>\", \"fuse_unk\": true,\n"
    "  \"byte_fallback\": true, \"vocab\": {\"<unk>\": 0, \"<s>\": 1, \"</s>\": 2, \"<0x0A>\": 3,\n"
    "   \"\xE2\x96\x81\": 4, \"a\": 5, \"b\": 6, \"ab\": 7, \"\xE2\x96\x81" "a\": 8, \"bb\": 9},\n"
    "  \"merges\": [\"a b\", \"\xE2\x96\x81 a\", \"b b\"]}}\n";

TEST(sentencepiece_style) {
    rlhf_ctx *ctx = tt_open();
    rlhf_tokenizer *t = tt_load(ctx, test_write("tokenizer.json", tt_sp));
    REQUIRE(t);
    CHECK_EQ_I(rlhf_tokenizer_bos(t), 1);
    CHECK_EQ_I(rlhf_tokenizer_eos(t), 2);
    CHECK_EQ_S(tt_ids(t, "ab a", 4, 1), "1 4 7 8");
    CHECK_EQ_S(tt_ids(t, "bbb  a", 6, 0), "4 9 6 4 8");
    CHECK_EQ_S(tt_ids(t, "a\nzzb", 5, 0), "8 3 0 6");
    CHECK_EQ_S(tt_ids(t, "a</s>b", 6, 0), "8 2 4 6");
    CHECK_EQ_S(tt_ids(t, "", 0, 1), "1");
    CHECK(tt_round(ctx, t, "ab a\nbb", 7));
    rlhf_tokenizer_close(t);
    rlhf_close(ctx);
}

/* A word long enough for every path of the queue: the ids must not depend on how it was cut. */
TEST(long_words) {
    rlhf_ctx *ctx = tt_open();
    rlhf_tokenizer *t = tt_train(ctx, "aaaaaaaa aaaaaaaa aaaa aaaa aa aa", 262);
    REQUIRE(t);
    size_t n = 100001;
    char *text = malloc(n);
    int32_t *ids = malloc(n * sizeof *ids);
    memset(text, 'a', n);
    int got = 0, bytes = 0;
    CHECK_EQ_I(rlhf_encode(t, text, n, 0, ids, (int)n, &got), RLHF_OK);
    for (int i = 0; i < got; i++) bytes += t->pieces[ids[i]].len;
    CHECK_EQ_I(bytes, n);
    CHECK(got < 30000);
    free(text);
    free(ids);
    rlhf_tokenizer_close(t);
    rlhf_close(ctx);
}

/* ---- errors ---------------------------------------------------------------------------------- */

/* Opening the text as tokenizer.json fails with the status and says what. */
static void tt_refused(const char *text, rlhf_status status, const char *says) {
    rlhf_ctx *ctx = tt_open();
    rlhf_tokenizer *t = NULL;
    CHECK_EQ_I(rlhf_tokenizer_open(ctx, test_write("tokenizer.json", text), &t), status);
    CHECK(!t);
    if (!strstr(rlhf_error(ctx), says) || !strstr(rlhf_error(ctx), "tokenizer.json"))
        test_fail(__FILE__, __LINE__, "\"%s\" does not say %s", rlhf_error(ctx), says);
    rlhf_close(ctx);
}

#define TT_MODEL "\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 1}, \"merges\": []}"

TEST(bad_files) {
    tt_refused("{\n \"model\": {\n  \"vocab\" 3}}", RLHF_ERR_FORMAT, "tokenizer.json:3: bad JSON");
    tt_refused("", RLHF_ERR_FORMAT, "tokenizer.json:1: bad JSON");
    tt_refused("[]", RLHF_ERR_FORMAT, "model");
    tt_refused("{}", RLHF_ERR_FORMAT, "missing \"model\"");
    tt_refused("{\"model\": 3}", RLHF_ERR_FORMAT, "key \"model\": found 3, expected an object");
    tt_refused("{\"model\": {\"vocab\": {\"a\": -1}, \"merges\": []}}", RLHF_ERR_FORMAT,
               "found -1");
    tt_refused("{\"model\": {\"vocab\": {\"a\": 0}, \"merges\": [\"a b\"]}}", RLHF_ERR_FORMAT,
               "model.merges");
    tt_refused("{\"model\": {\"vocab\": {\"a\": 0}, \"merges\": [7]}}", RLHF_ERR_FORMAT, "found 7");
    tt_refused("{\"model\": {\"type\": \"Unigram\"}}", RLHF_ERR_UNSUPPORTED,
               "key \"model.type\": \"Unigram\" is not supported");
    tt_refused("{\"normalizer\": {\"type\": \"BertNormalizer\"}, " TT_MODEL "}",
               RLHF_ERR_UNSUPPORTED, "normalizer.type");
    tt_refused("{\"pre_tokenizer\": {\"type\": \"Whitespace\"}, " TT_MODEL "}",
               RLHF_ERR_UNSUPPORTED, "pre_tokenizer.type");
    tt_refused("{\"post_processor\": {\"type\": \"BertProcessing\"}, " TT_MODEL "}",
               RLHF_ERR_UNSUPPORTED, "post_processor.type");
    tt_refused("{\"decoder\": {\"type\": \"CTC\"}, " TT_MODEL "}", RLHF_ERR_UNSUPPORTED,
               "decoder.type");
    tt_refused("{\"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": \"(\"},"
               " \"behavior\": \"Isolated\"}, " TT_MODEL "}", RLHF_ERR_UNSUPPORTED,
               "pattern \"(\"");
}

TEST(missing_files_and_bad_ids) {
    rlhf_ctx *ctx = tt_open();
    rlhf_tokenizer *t = NULL;
    CHECK_EQ_I(rlhf_tokenizer_open(ctx, test_path("none"), &t), RLHF_ERR_IO);
    CHECK(strstr(rlhf_error(ctx), "none") && strstr(rlhf_error(ctx), "No such file"));
    CHECK_EQ_I(rlhf_tokenizer_open(ctx, test_dir(), &t), RLHF_ERR_IO);
    CHECK(strstr(rlhf_error(ctx), "tokenizer.json"));
    t = tt_train(ctx, tt_text, 257);
    REQUIRE(t);
    char *text = NULL;
    int32_t ids[] = {0, 257};
    CHECK_EQ_I(rlhf_decode(t, ids, 2, 0, &text, NULL), RLHF_ERR_ARG);
    CHECK(strstr(rlhf_error(ctx), "257") && strstr(rlhf_error(ctx), "256"));
    ids[1] = -1;
    CHECK_EQ_I(rlhf_decode(t, ids, 2, 0, &text, NULL), RLHF_ERR_ARG);
    rlhf_tokenizer_close(t);
    rlhf_close(ctx);
}

/* Whatever allocation fails, the call says so and leaves nothing behind. */
TEST(out_of_memory) {
    const char *path = test_write("tokenizer.json", tt_sp);
    for (int64_t n = 0; test_next_oom(&n);) {
        rlhf_ctx *ctx = NULL;
        rlhf_options options = rlhf_options_default();
        options.threads = 1;
        options.hooks = test_hooks();
        if (rlhf_open(&ctx, &options) != RLHF_OK) continue;
        rlhf_tokenizer *t = NULL;
        rlhf_status s = rlhf_tokenizer_open(ctx, path, &t);
        CHECK(s == RLHF_OK || s == RLHF_ERR_MEMORY);
        int count = 0;
        if (t) {
            s = rlhf_encode(t, "ab \xE2\x98\x83 a", 8, 1, NULL, 0, &count);
            CHECK(s == RLHF_ERR_MEMORY || (s == RLHF_OK && count > 3));
            CHECK(tt_round(ctx, t, "ab a", 4) || ctx->status == RLHF_ERR_MEMORY);
        }
        rlhf_tokenizer_close(t);
        rlhf_close(ctx);
        CHECK_EQ_I(test_live(), 0);
    }
    for (int64_t n = 0; !test_quick() && test_next_oom(&n);) {
        rlhf_ctx *ctx = NULL;
        rlhf_options options = rlhf_options_default();
        options.threads = 1;
        options.hooks = test_hooks();
        if (rlhf_open(&ctx, &options) != RLHF_OK) continue;
        rlhf_tokenizer *t = NULL;
        const char *text = tt_text;
        size_t len = strlen(text);
        rlhf_status s = rlhf_tokenizer_train(ctx, &text, &len, 1, 265, &t);
        CHECK(s == RLHF_OK ? t != NULL : s == RLHF_ERR_MEMORY);
        rlhf_tokenizer_close(t);
        rlhf_close(ctx);
        CHECK_EQ_I(test_live(), 0);
    }
}

/* ---- files and JSON -------------------------------------------------------------------------- */

/* A constant text as an argument of tt_call. */
#define TT_ARG (void *)(uintptr_t)

/* Runs fn(ctx, arg) as a public call. */
static rlhf_status tt_call(rlhf_ctx *ctx, void (*fn)(rlhf_ctx *, void *), void *arg) {
    err_frame frame;
    mem_enter(ctx, &frame);
    if (setjmp(frame.jump)) return mem_leave(ctx, 1);
    fn(ctx, arg);
    return mem_leave(ctx, 0);
}

static void tt_write_then_fail(rlhf_ctx *ctx, void *path) {
    io_file *f = io_create(ctx, path);
    io_write(f, "half", 4);
    err_throw(ctx, RLHF_ERR_DATA, "on purpose");
}

static void tt_write_whole(rlhf_ctx *ctx, void *path) {
    io_write_file(ctx, path, "whole", 5);
}

static void tt_check_whole(rlhf_ctx *ctx, void *path) {
    size_t n = 0;
    char *text = io_read(ctx, path, 5, &n);
    CHECK_EQ_S(text, "whole");
    CHECK_EQ_I(n, 5);
    mem_free(text);
    io_view *v = io_map(ctx, path);
    CHECK(v->size == 5 && memcmp(v->data, "whole", 5) == 0);
    err_release(ctx);
}

static void tt_read_4(rlhf_ctx *ctx, void *path) {
    size_t n;
    mem_free(io_read(ctx, path, 4, &n));
}

static void tt_mkdirs(rlhf_ctx *ctx, void *path) {
    io_mkdirs(ctx, path);
}

TEST(files_appear_whole_or_not_at_all) {
    rlhf_ctx *ctx = tt_open();
    char path[1024], deep[1100];
    snprintf(path, sizeof path, "%s/f", test_dir());
    CHECK_EQ_I(tt_call(ctx, tt_write_then_fail, path), RLHF_ERR_DATA);
    CHECK(rmdir(test_dir()) == 0 && mkdir(test_dir(), 0777) == 0); /* not even the temporary */
    CHECK_EQ_I(tt_call(ctx, tt_write_whole, path), RLHF_OK);
    CHECK_EQ_I(tt_call(ctx, tt_write_then_fail, path), RLHF_ERR_DATA);
    CHECK_EQ_I(tt_call(ctx, tt_check_whole, path), RLHF_OK);
    CHECK_EQ_I(tt_call(ctx, tt_read_4, path), RLHF_ERR_IO);
    CHECK(strstr(rlhf_error(ctx), "larger than 4 bytes"));
    CHECK_EQ_I(tt_call(ctx, tt_read_4, TT_ARG test_dir()), RLHF_ERR_IO);
    snprintf(deep, sizeof deep, "%s/f/g", test_dir());
    CHECK_EQ_I(tt_call(ctx, tt_mkdirs, deep), RLHF_ERR_IO);
    snprintf(deep, sizeof deep, "%s/a//b/c/", test_dir());
    CHECK_EQ_I(tt_call(ctx, tt_mkdirs, deep), RLHF_OK);
    CHECK_EQ_I(tt_call(ctx, tt_mkdirs, deep), RLHF_OK);
    CHECK(io_is_dir(deep));
    rlhf_close(ctx);
}

TEST(gzip_is_read_like_plain_text) {
    rlhf_ctx *ctx = tt_open();
    const char *path = test_path("f.gz");
    gzFile gz = gzopen(path, "wb");
    REQUIRE(gz);
    CHECK_EQ_I(gzwrite(gz, "whole", 5), 5);
    gzclose(gz);
    err_frame frame;
    size_t n = 0;
    mem_enter(ctx, &frame);
    if (setjmp(frame.jump)) test_fail(__FILE__, __LINE__, "%s", rlhf_error(ctx));
    else {
        char *text = io_read(ctx, path, 100, &n);
        CHECK_EQ_S(text, "whole");
        mem_free(text);
    }
    mem_leave(ctx, 0);
    CHECK_EQ_I(truncate(path, 12), 0);
    CHECK_EQ_I(tt_call(ctx, tt_read_4, TT_ARG path), RLHF_ERR_IO);
    CHECK(strstr(rlhf_error(ctx), "gzip"));
    rlhf_close(ctx);
}

static void tt_json(rlhf_ctx *ctx, void *arg) {
    json_src src = {ctx, RLHF_ERR_DATA, "prefs.jsonl", 17, ""};
    const char *text = arg;
    json_t *v = json_parse(&src, text, strlen(text));
    json_need_str(&src, v, "chosen");
    json_need_int(&src, v, "n", 0, 5);
    CHECK_EQ_I(json_opt_bool(&src, v, "flag", 1), 1);
    err_release(ctx);
}

TEST(json_errors_name_file_line_and_key) {
    static const struct { const char *text, *says; } cases[] = {
        {"{\"chosen\": 3}", "prefs.jsonl:17: key \"chosen\": found 3, expected a string"},
        {"{}", "prefs.jsonl:17: missing \"chosen\""},
        {"{\"chosen\": null}", "prefs.jsonl:17: missing \"chosen\""},
        {"{\"chosen\": \"\", \"n\": 6}", "key \"n\": found 6, expected an integer from 0 to 5"},
        {"{\"chosen\": \"\", \"n\": 1.5}", "key \"n\": found 1.5"},
        {"{\"chosen\": \"\", \"n\": 1, \"flag\": \"yes\"}", "\"yes\", expected true or false"},
        {"{\"chosen\": \"a\\u0000b\", \"n\": 1}", "without NUL"},
        {"{\"chosen\": ", "prefs.jsonl:17: bad JSON"}};
    rlhf_ctx *ctx = tt_open();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        CHECK_EQ_I(tt_call(ctx, tt_json, TT_ARG cases[i].text), RLHF_ERR_DATA);
        if (!strstr(rlhf_error(ctx), cases[i].says))
            test_fail(__FILE__, __LINE__, "\"%s\" does not say %s", rlhf_error(ctx), cases[i].says);
    }
    CHECK_EQ_I(tt_call(ctx, tt_json, TT_ARG "{\"chosen\": \"\", \"n\": 2.0, \"x\": 1e999}"),
               RLHF_ERR_DATA);
    CHECK_EQ_I(tt_call(ctx, tt_json, TT_ARG "{\"chosen\": \"\", \"n\": 2.0}"), RLHF_OK);
    rlhf_close(ctx);
}

typedef struct form {
    const char *text;
    char got[64];
} form;

static void form_run(rlhf_ctx *ctx, void *arg) {
    form *f = arg;
    tok_buf b = {ctx, NULL, 0, 0};
    tok_normal_form(&b, UTF8PROC_STABLE | UTF8PROC_COMPOSE, f->text, strlen(f->text));
    snprintf(f->got, sizeof f->got, "%.*s", (int)b.n, b.p);
    mem_free(b.p);
}

/* Composition loses nothing: U+11A7 stands just before the final consonants of Hangul. */
static void case_composition_of_hangul(void) {
    static const char *const cases[][2] = {
        {"\u1100\u1161", "\uac00"},
        {"\u1100\u1161\u11a8", "\uac01"},
        {"\uac00\u11a8", "\uac01"},
        {"\uac00\u11a7", "\uac00\u11a7"},
        {"\u1100\u1161\u11a7x", "\uac00\u11a7x"},
        {"e\u0301\uac00\u11a7\u0301\u0316", "\u00e9\uac00\u11a7\u0316\u0301"},
        {"\uac00\u11a7\u11a8", "\uac00\u11a7\u11a8"}};
    rlhf_ctx *ctx = test_context("auto", 1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        form f = {cases[i][0], ""};
        CHECK_EQ_I(test_call(ctx, form_run, &f), RLHF_OK);
        CHECK_EQ_S(f.got, cases[i][1]);
    }
    rlhf_close(ctx);
}

TEST_MAIN(CASE(golden_gpt2), CASE(golden_qwen), CASE(golden_llama3), CASE(golden_llama2),
          CASE(golden_mistral), CASE(chat_qwen), CASE(chat_llama3),
          CASE(chat_spans_cover_answers_and_ends), CASE(chat_unknown_template_names_the_choices),
          CASE(training_matches_the_reference), CASE(training_is_deterministic_and_saved_whole),
          CASE(training_stops_when_nothing_repeats), CASE(any_text_comes_back),
          CASE(bad_utf8_becomes_replacement_characters), CASE(encode_with_no_room_measures),
          CASE(sentencepiece_style), CASE(composition_of_hangul),
          CASE(long_words), CASE(bad_files),
          CASE(missing_files_and_bad_ids), CASE(out_of_memory),
          CASE(files_appear_whole_or_not_at_all), CASE(gzip_is_read_like_plain_text),
          CASE(json_errors_name_file_line_and_key))
