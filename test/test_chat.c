/* Chat templates. test/golden/chat.json, which make_chat.py writes, has what the Jinja
 * environment of transformers makes of each template. */

#include "../rlhf.c"
#include "test.h"

/* ---- helpers --------------------------------------------------------------------------------- */

/* A tokenizer with that end of turn as a token, and that Jinja text; each may be null. */
static rlhf_tokenizer *tokenizer_with(rlhf_ctx *ctx, const char *end, const char *jinja) {
    const char *text = "the cat sat on the mat";
    size_t len = strlen(text);
    rlhf_tokenizer *t = NULL;
    OK(ctx, rlhf_tokenizer_train(ctx, &text, &len, 1, 257, &t));
    OK(ctx, rlhf_tokenizer_save(t, test_dir()));
    rlhf_tokenizer_close(t);
    json_t *root = json_load_file(test_path("tokenizer.json"), 0, NULL);
    if (end && *end)
        json_array_append_new(json_object_get(root, "added_tokens"),
                              json_pack("{s:i,s:s,s:b}", "id", 257, "content", end, "special", 1));
    CHECK(json_dump_file(root, test_path("tokenizer.json"), 0) == 0);
    json_decref(root);
    unlink(test_path("chat_template.jinja"));
    if (jinja) test_write("chat_template.jinja", jinja);
    OK(ctx, rlhf_tokenizer_open(ctx, test_dir(), &t));
    return t;
}

/* A rendering, as a public call would make it. */
typedef struct rendering {
    rlhf_tokenizer *t;
    const char *name; /* what was chosen */
    const chat_message *m;
    int n, generate, n_spans;
    char *text;
    chat_span span[16];
} rendering;

static void run_render(rlhf_ctx *ctx, void *arg) {
    rendering *r = arg;
    (void)ctx;
    r->name = chat_choose(r->t, r->name)->name;
    r->text = chat_render(r->t, r->name, r->m, r->n, r->generate, r->span, &r->n_spans);
}

static void run_choose(rlhf_ctx *ctx, void *arg) {
    rendering *r = arg;
    (void)ctx;
    r->name = chat_choose(r->t, r->name)->name;
}

static json_t *read_golden(void) {
    const char *base = getenv("RLHF_GOLDEN");
    char path[1024];
    snprintf(path, sizeof path, "%s/chat.json", base && *base ? base : "test/golden");
    json_t *root = json_load_file(path, 0, NULL);
    if (!root) test_fail(__FILE__, __LINE__, "cannot read %s", path);
    return root;
}

/* One conversation with one template: its text, or the refusal of it, and what bears loss. */
static void check_rendering(rlhf_ctx *ctx, rlhf_tokenizer *t, const json_t *template,
                            const json_t *conversation, const json_t *want) {
    const char *name = json_string_value(json_object_get(template, "name"));
    const char *ask = json_string_value(json_object_get(template, "ask"));
    const char *text = json_string_value(json_object_get(want, "text"));
    const json_t *loss = json_object_get(want, "loss");
    chat_message m[16];
    int n = (int)json_array_size(conversation);
    for (int i = 0; i < n; i++) {
        const json_t *turn = json_array_get(conversation, (size_t)i);
        m[i].role = json_string_value(json_object_get(turn, "role"));
        m[i].content = json_string_value(json_object_get(turn, "content"));
    }
    for (int generate = 0; generate < 2; generate++) {
        rendering r = {.t = t, .name = name, .m = m, .n = n, .generate = generate};
        rlhf_status status = test_call(ctx, run_render, &r);
        CHECK_EQ_I(status, text ? RLHF_OK : RLHF_ERR_DATA);
        if (status) continue;
        char whole[4096];
        snprintf(whole, sizeof whole, "%s%s", text ? text : "(refused)", generate ? ask : "");
        CHECK_EQ_S(r.text, whole);
        for (int i = 0; text && !generate && json_is_array(loss) && i < r.n_spans; i++) {
            char *part = strndup(r.text + r.span[i].start, r.span[i].end - r.span[i].start);
            CHECK_EQ_S(part, json_string_value(json_array_get(loss, (size_t)i)));
            free(part);
        }
        if (json_is_array(loss)) CHECK_EQ_I(json_array_size(loss), r.n_spans);
        rlhf_free(ctx, r.text);
    }
}

/* ---- tests ----------------------------------------------------------------------------------- */

TEST(renderings_are_those_of_jinja) {
    json_t *root = read_golden(), *row;
    REQUIRE(root);
    const json_t *conversations = json_object_get(root, "conversations");
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *t = tokenizer_with(ctx, NULL, NULL);
    size_t i;
    json_array_foreach(json_object_get(root, "templates"), i, row) {
        const char *name = json_string_value(json_object_get(row, "name"));
        const json_t *rows = json_object_get(row, "renderings");
        int failures = test_failures;
        for (size_t k = 0; k < json_array_size(rows); k++)
            check_rendering(ctx, t, row, json_array_get(conversations, k), json_array_get(rows, k));
        if (test_failures > failures) test_fail(__FILE__, __LINE__, "those were of %s", name);
    }
    /* Every template that is offered is in the golden file. */
    CHECK_EQ_I(json_array_size(json_object_get(root, "templates")), CHAT_TEMPLATES);
    rlhf_tokenizer_close(t);
    rlhf_close(ctx);
    json_decref(root);
}

TEST(templates_are_recognised) {
    json_t *root = read_golden(), *row;
    REQUIRE(root);
    rlhf_ctx *ctx = test_context("auto", 1);
    size_t i;
    json_array_foreach(json_object_get(root, "templates"), i, row) {
        const char *name = json_string_value(json_object_get(row, "name"));
        const char *close = json_string_value(json_object_get(row, "close"));
        const char *jinja = json_string_value(json_object_get(row, "jinja"));
        rendering r = {.name = "auto"};
        r.t = tokenizer_with(ctx, close, jinja);
        rlhf_status status = test_call(ctx, run_choose, &r);
        /* Nothing tells plain text apart; without thoughts is a choice, not another template. */
        if (!strcmp(name, "plain")) CHECK_EQ_I(status, RLHF_ERR_UNSUPPORTED);
        else CHECK_EQ_S(r.name, strcmp(name, "qwen3-nothink") ? name : "qwen3");
        rlhf_tokenizer_close(r.t);
        /* The same words with another end of turn are another template. */
        if (!*close) continue;
        r = (rendering){.name = "auto", .t = tokenizer_with(ctx, NULL, jinja)};
        CHECK_EQ_I(test_call(ctx, run_choose, &r), RLHF_ERR_UNSUPPORTED);
        rlhf_tokenizer_close(r.t);
    }
    rlhf_close(ctx);
    json_decref(root);
}

TEST(names_are_those_offered) {
    char names[512], *at = names;
    snprintf(names, sizeof names, "%s", rlhf_chat_templates());
    CHECK_EQ_S(strsep(&at, "|"), "auto");
    for (int i = 0; i < CHAT_TEMPLATES; i++) CHECK_EQ_S(strsep(&at, "|"), chat_templates[i].name);
    CHECK(!at);
}

/* Relatives that write something else are not taken for what they resemble. */
TEST(relatives_are_unknown) {
    static const struct { const char *close, *jinja; } other[] = {
        {"<|im_end|>", "<|im_start|> <|im_end|> '<|im_start|>system\\nYou are Dolphin'"},
        {"<|im_end|>", "<|im_start|> <|im_end|> You are a pirate."},
        {"<|im_end|>", "<|im_start|> <|im_end|> {% set think = true %}"},
        {"<|im_end|>", "{{ bos_token }} <|im_start|> <|im_end|>"},
        {"<|im_end|>", "<|im_start|> if loop.index0 > ns.last_query_index {{ '<think>\\n' }}"},
        {"<|eot_id|>", "<|start_header_id|> <|eot_id|> You are a pirate."},
        {"</s>", "'[INST] ' + message + ' [/INST]'"},
        {"</s>", "[INST] <<SYS>> [/INST]"},
        {"</s>", "[SYSTEM_PROMPT] [INST] [/INST]"},
        {"</s>", "<|system|> <|user|> <|assistant|> {{ eos_token }}{% endif %}"},
        {"<|end|>", "{{ bos_token }} <|system|> <|user|> <|assistant|> <|end|>"},
        {"<end_of_turn>", "<start_of_turn>developer"}};
    rlhf_ctx *ctx = test_context("auto", 1);
    for (size_t i = 0; i < sizeof other / sizeof *other; i++) {
        rendering r = {.name = "auto", .t = tokenizer_with(ctx, other[i].close, other[i].jinja)};
        if (test_call(ctx, run_choose, &r) != RLHF_ERR_UNSUPPORTED)
            test_fail(__FILE__, __LINE__, "%s is taken for %s", other[i].jinja, r.name);
        CHECK(strstr(rlhf_error(ctx), "--chat_template") && strstr(rlhf_error(ctx), "zephyr"));
        rlhf_tokenizer_close(r.t);
    }
    rlhf_close(ctx);
}

TEST(refusals_say_what_to_do) {
    static const chat_message with_system[] = {{"system", "s"}, {"user", "u"}};
    static const chat_message twice[] = {{"user", "u"}, {"user", "u"}};
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *t = tokenizer_with(ctx, NULL, NULL);
    rendering r = {.t = t, .name = "gemma", .m = with_system, .n = 2};
    CHECK_EQ_I(test_call(ctx, run_render, &r), RLHF_ERR_DATA);
    CHECK(strstr(rlhf_error(ctx), "gemma: ") && strstr(rlhf_error(ctx), "user's first"));
    r = (rendering){.t = t, .name = "mistral-v0.3", .m = twice, .n = 2};
    CHECK_EQ_I(test_call(ctx, run_render, &r), RLHF_ERR_DATA);
    CHECK(strstr(rlhf_error(ctx), "alternation") != NULL);
    r = (rendering){.t = t, .name = "gemma-3", .m = with_system, .n = 1};
    CHECK_EQ_I(test_call(ctx, run_render, &r), RLHF_ERR_DATA);
    rlhf_tokenizer_close(t);
    rlhf_close(ctx);
}

TEST_MAIN(CASE(renderings_are_those_of_jinja), CASE(templates_are_recognised),
          CASE(names_are_those_offered), CASE(relatives_are_unknown),
          CASE(refusals_say_what_to_do))
