/* The public interface: memory that runs out anywhere, bad arguments, two contexts on
 * two threads, hooks, configurations, checkpoints there and back, and what rlhf_generate promises.
 */

#include "../rlhf.c"
#include "test.h"

#include <pthread.h>

/* ---- helpers --------------------------------------------------------------------------------- */

/* JSON text with ' for ". The last two results stay valid. */
static const char *quoted(const char *text) {
    static _Thread_local char buffers[2][8192];
    static _Thread_local int next;
    char *out = buffers[next++ % 2];
    snprintf(out, sizeof buffers[0], "%s", text);
    for (char *c = out; *c; c++)
        if (*c == '\'') *c = '"';
    return out;
}

/* A tokenizer.json with the 97 entries that the golden models know: <s> is 1, </s> is 2, then the
 * printable characters from the space on; no merges. */
static rlhf_tokenizer *small_tok(rlhf_ctx *ctx) {
    char text[8192];
    size_t n = (size_t)snprintf(
        text, sizeof text,
        "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"added_tokens\":["
        "{\"id\":1,\"content\":\"<s>\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,"
        "\"normalized\":false,\"special\":true},{\"id\":2,\"content\":\"</s>\",\"single_word\":"
        "false,\"lstrip\":false,\"rstrip\":false,\"normalized\":false,\"special\":true}],"
        "\"normalizer\":null,\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,"
        "\"trim_offsets\":true,\"use_regex\":true},\"post_processor\":null,\"decoder\":{\"type\":"
        "\"ByteLevel\",\"add_prefix_space\":true,\"trim_offsets\":true,\"use_regex\":true},"
        "\"model\":{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":null,"
        "\"continuing_subword_prefix\":null,\"end_of_word_suffix\":null,\"fuse_unk\":false,"
        "\"byte_fallback\":false,\"vocab\":{\"<s>\":1,\"</s>\":2,\"\\u010a\":0,\"\\u0120\":3");
    for (int c = '!'; c < '!' + 93; c++)
        n += (size_t)snprintf(text + n, sizeof text - n, ",\"%s%c\":%d",
                              c == '"' || c == '\\' ? "\\" : "", c, c - '!' + 4);
    snprintf(text + n, sizeof text - n, "},\"merges\":[]}}");
    const char *path = test_write("tokenizer.json", text);
    test_write("tokenizer_config.json", "{\"bos_token\":\"<s>\",\"eos_token\":\"</s>\"}");
    rlhf_tokenizer *tok = NULL;
    OK(ctx, rlhf_tokenizer_open(ctx, path, &tok));
    return tok;
}

static rlhf_dataset *small_data(rlhf_ctx *ctx, rlhf_tokenizer *tok, rlhf_data_kind kind,
                                const char *jsonl) {
    rlhf_data_config config = rlhf_data_config_default(kind);
    rlhf_dataset *d = NULL;
    const char *text = quoted(jsonl);
    OK(ctx, rlhf_dataset_parse(ctx, text, strlen(text), "mem", tok, &config, &d));
    return d;
}

static const char sft_lines[] = "{'text':'one two'}\n{'prompt':'a','completion':' bc'}\n"
                                "{'text':'three'}\n{'text':'x y z'}\n";
static const char pair_lines[] = "{'prompt':'a','chosen':' b','rejected':' cd','domain':'x'}\n"
                                 "{'prompt':'aa','chosen':' bb','rejected':' c','domain':'y'}\n";
static const char prompt_lines[] = "{'prompt':'a b'}\n{'prompt':'hello'}\n{'prompt':'c'}\n";

static const char *const golden[] = {"test/golden/gpt2", "test/golden/llama",
                                     "test/golden/llama_tied"};

static rlhf_model *open_model(rlhf_ctx *ctx, const char *dir) {
    rlhf_model *m = NULL;
    OK(ctx, rlhf_model_open(ctx, dir, &m));
    return m;
}

static const char *hash_of(rlhf_model *m) {
    static _Thread_local char hash[4][17];
    static _Thread_local int next;
    char *out = hash[next++ % 4];
    if (rlhf_model_hash(m, out) != RLHF_OK) out[0] = 0;
    return out;
}

static rlhf_status count_letters(void *user, const rlhf_sample *s, int n, float *reward) {
    (void)user;
    for (int i = 0; i < n; i++) {
        reward[i] = 0;
        for (const char *c = s[i].completion; *c; c++) reward[i] += *c >= 'a' && *c <= 'm';
    }
    return RLHF_OK;
}

/* ---- memory runs out at every allocation ----------------------------------------------------- */

/* The status of a call inside a loop over failing allocations, which fails neatly or can do without
 * that memory (a pattern that is not compiled to machine code). */
static void check_oom(int line, rlhf_ctx *ctx, rlhf_status status, const char *what) {
    bool failed = atomic_load(&test_call_failed);
    if (status != RLHF_OK && (status != RLHF_ERR_MEMORY || !failed))
        test_fail(__FILE__, line, "%s: %s (%s)%s", what, rlhf_status_text(status), rlhf_error(ctx),
                  failed ? " when an allocation fails" : "");
}

/* Runs the statement until it needs no more failing allocations; it sets `status`. Every call gives
 * back all it took when it failed. */
#define EACH_OOM(ctx, what, statement)                                                             \
    do {                                                                                           \
        int64_t oom_n_ = 0;                                                                        \
        while (test_next_oom(&oom_n_)) {                                                           \
            rlhf_status status = RLHF_OK;                                                          \
            statement;                                                                             \
            check_oom(__LINE__, ctx, status, what);                                                \
            if (test_failures >= test_shown) break;                                                \
        }                                                                                          \
        test_fail_at(0);                                                                           \
        CHECK(oom_n_ > 1);                                                                         \
    } while (0)

/* Bytes of this process's memory that are mapped, 0 where the system does not say. */
static double mapped_bytes(void) {
    FILE *f = fopen("/proc/self/statm", "r");
    double pages = 0;
    if (f && fscanf(f, "%lf", &pages) != 1) pages = 0;
    if (f) fclose(f);
    return pages * (double)sysconf(_SC_PAGESIZE);
}

/* Memory of a host without hooks: aligned, writable to its ends, and given back where it is large,
 * even below a block that stays. */
TEST(default_memory) {
    static const size_t sizes[] = {1, 100, API_LARGE - 1, API_LARGE, API_LARGE + 1, 1 << 22,
                                   (1 << 22) + 1, 50 << 20};
    double before = mapped_bytes();
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        size_t n = sizes[i];
        char *p[2];
        for (int k = 0; k < 2; k++) {
            p[k] = api_default_alloc(NULL, n);
            REQUIRE(p[k]);
            CHECK((uintptr_t)p[k] % (n >= 1 << 22 ? 1 << 21 : 16) == 0);
            memset(p[k], 1, n);
        }
        api_default_free(NULL, p[0], n);
        if (before > 0 && n >= API_LARGE)
            CHECK(mapped_bytes() - before < 1.5 * (double)n + (1 << 20));
        CHECK(p[1][0] == 1 && p[1][n - 1] == 1);
        api_default_free(NULL, p[1], n);
    }
    CHECK(!api_default_alloc(NULL, SIZE_MAX) && !api_default_alloc(NULL, SIZE_MAX / 2 - 1));
}

TEST(oom_context) {
    for (int64_t n = 0; test_next_oom(&n);) {
        rlhf_options options = rlhf_options_default();
        options.hooks = test_hooks();
        rlhf_ctx *ctx = NULL;
        rlhf_status status = rlhf_open(&ctx, &options);
        CHECK(status == RLHF_OK ? ctx != NULL : status == RLHF_ERR_MEMORY && !ctx);
        rlhf_close(ctx);
        CHECK_EQ_I(test_live(), 0);
    }
}

TEST(oom_tokenizer) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = small_tok(ctx), *t = NULL;
    int64_t live = test_live();
    const char *texts[1] = {"the cat sat on the mat and the hat"};
    size_t lens[1] = {strlen(texts[0])};
    EACH_OOM(ctx, "train", {
        status = rlhf_tokenizer_train(ctx, texts, lens, 1, 262, &t);
        if (status) CHECK(t == NULL);
        rlhf_tokenizer_close(t);
        CHECK_EQ_I(test_live(), live);
    });
    char path[1024];
    snprintf(path, sizeof path, "%s/tokenizer.json", test_dir());
    EACH_OOM(ctx, "open", {
        status = rlhf_tokenizer_open(ctx, path, &t);
        if (status) CHECK(t == NULL);
        rlhf_tokenizer_close(t);
        CHECK_EQ_I(test_live(), live);
    });
    EACH_OOM(ctx, "save", status = rlhf_tokenizer_save(tok, test_path("saved")));
    int32_t ids[4] = {5, 6, 7, 8};
    EACH_OOM(ctx, "decode", {
        char *text = NULL;
        status = rlhf_decode(tok, ids, 4, 1, &text, NULL);
        rlhf_free(ctx, text);
    });
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

/* A failed call leaves nothing wrong in what the tokenizer remembers of words it has seen. */
TEST(oom_encode) {
    rlhf_ctx *ctx = test_context("auto", 1);
    const char *texts[1] = {"the cat sat on the mat and the hat of the cat is on the mat"};
    size_t lens[1] = {strlen(texts[0])};
    rlhf_tokenizer *tok = NULL, *other = NULL;
    OK(ctx, rlhf_tokenizer_train(ctx, texts, lens, 1, 280, &tok));
    OK(ctx, rlhf_tokenizer_train(ctx, texts, lens, 1, 280, &other));
    static const char text[] = "the cat sat, the hat mat! on <|endoftext|> the b\xc3\xa4r matthat";
    int32_t want[64], ids[64];
    int n_want = 0, n = 0;
    OK(ctx, rlhf_encode(other, text, sizeof text - 1, 1, want, 64, &n_want));
    EACH_OOM(ctx, "encode", {
        test_fail_at(0);
        OK(ctx, rlhf_tokenizer_train(ctx, texts, lens, 1, 280, &tok));
        test_fail_at(oom_n_);
        status = rlhf_encode(tok, text, sizeof text - 1, 1, ids, 64, &n);
        bool failed = atomic_load(&test_call_failed);
        test_fail_at(0);
        for (int again = 0; again < 2; again++) {
            if (status || again) OK(ctx, rlhf_encode(tok, text, sizeof text - 1, 1, ids, 64, &n));
            CHECK_EQ_I(n, n_want);
            CHECK(memcmp(ids, want, (size_t)n_want * sizeof *ids) == 0);
        }
        rlhf_tokenizer_close(tok);
        atomic_store(&test_call_failed, failed);
    });
    rlhf_tokenizer_close(other);
    rlhf_close(ctx);
}

TEST(oom_dataset) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = small_tok(ctx);
    static const struct {
        rlhf_data_kind kind;
        const char *lines;
    } cases[] = {
        {RLHF_DATA_SFT, "{'messages':[{'role':'user','content':'a'},{'role':'assistant',"
                        "'content':'b'}],'domain':'x'}\n{'prompt':'a','completion':'b'}\n"},
        {RLHF_DATA_PREFERENCE, "{'prompt':[{'role':'user','content':'a'}],'chosen':'b',"
                               "'rejected':'c'}\n{'chosen':'ab','rejected':'ac'}\n"},
        {RLHF_DATA_PROMPT, "{'prompt':[{'role':'user','content':'a'}]}\n{'prompt':'b'}\n"},
        {RLHF_DATA_SCORE, "[{'text':'a'},{'text':'b'}]"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[512];
        snprintf(text, sizeof text, "%s", quoted(cases[i].lines));
        rlhf_data_config config = rlhf_data_config_default(cases[i].kind);
        int64_t live = test_live();
        int used = 0;
        EACH_OOM(ctx, "dataset_parse", {
            rlhf_dataset *d = NULL;
            int defers = ctx->n_defer;
            status = rlhf_dataset_parse(ctx, text, strlen(text), "mem", tok, &config, &d);
            CHECK_EQ_I(ctx->n_defer, defers);
            if (status) CHECK(!d && strstr(rlhf_error(ctx), "memory"));
            else CHECK_EQ_I(rlhf_dataset_count(d), 2);
            rlhf_dataset_close(d);
            /* What the tokenizer remembers of words stays with it. */
            if (!used++) live = test_live() > live ? test_live() : live;
            CHECK(test_live() <= live + 8);
        });
        char path[1024];
        snprintf(path, sizeof path, "%s", test_write("data.jsonl", text));
        EACH_OOM(ctx, "dataset_open", {
            rlhf_dataset *d = NULL;
            status = rlhf_dataset_open(ctx, path, tok, &config, &d);
            rlhf_dataset_close(d);
        });
    }
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

TEST(oom_model) {
    for (size_t i = 0; i < sizeof golden / sizeof *golden; i++) {
        rlhf_ctx *ctx = test_context("auto", 1);
        int64_t live = test_live();
        EACH_OOM(ctx, "open", {
            rlhf_model *m = NULL;
            status = rlhf_model_open(ctx, golden[i], &m);
            if (status) CHECK(!m && strstr(rlhf_error(ctx), "memory"));
            rlhf_model_close(m);
            CHECK_EQ_I(test_live(), live);
            CHECK_EQ_I(ctx->n_defer, 0);
        });
        char path[256];
        snprintf(path, sizeof path, "%s/config.json", golden[i]);
        EACH_OOM(ctx, "init", {
            rlhf_model *m = NULL;
            status = rlhf_model_init(ctx, path, 20, 1, 2, 3, &m);
            rlhf_model_close(m);
            CHECK_EQ_I(test_live(), live);
        });
        rlhf_model *m = open_model(ctx, golden[i]);
        const char *hash = hash_of(m);
        for (int head = 0; head < 2; head++)
            EACH_OOM(ctx, "clone", {
                rlhf_model *copy = NULL;
                status = rlhf_model_clone(m, head ? RLHF_HEAD_SCORE : RLHF_HEAD_LM, &copy);
                if (!status && !head) CHECK_EQ_S(hash_of(copy), hash);
                rlhf_model_close(copy);
            });
        EACH_OOM(ctx, "save", {
            status = rlhf_model_save(m, NULL, test_path("model"));
            /* Whole files or none: what is there can be opened, no temporary is left. */
            DIR *dir = opendir(test_path("model"));
            for (struct dirent *e; dir && (e = readdir(dir));) CHECK(!strstr(e->d_name, ".tmp"));
            if (dir) closedir(dir);
        });
        rlhf_model *back = open_model(ctx, test_path("model"));
        CHECK_EQ_S(hash_of(back), hash);
        int32_t ids[6] = {3, 9, 27, 81, 50, 4};
        float logits[6 * 97], again[6 * 97], logp[5];
        OK(ctx, rlhf_model_logits(back, ids, 6, logits));
        rlhf_model_close(back);
        EACH_OOM(ctx, "logits", {
            memset(again, 0, sizeof again);
            status = rlhf_model_logits(m, ids, 6, again);
            if (!status) CHECK_BITS(again, logits, 6 * 97);
        });
        OK(ctx, rlhf_model_logits(m, ids, 6, again));
        CHECK_BITS(again, logits, 6 * 97);
        rlhf_model_close(m);
        m = open_model(ctx, golden[i]);
        EACH_OOM(ctx, "logprobs", status = rlhf_model_logprobs(m, ids, 6, logp));
        rlhf_model_close(m);
        rlhf_close(ctx);
    }
}

TEST(oom_generate_and_eval) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = small_tok(ctx);
    rlhf_dataset *d = small_data(ctx, tok, RLHF_DATA_PROMPT, prompt_lines);
    rlhf_dataset *text = small_data(ctx, tok, RLHF_DATA_SFT, sft_lines);
    const char *prompts[2] = {"hello", "a"};
    rlhf_generate_config config = rlhf_generate_config_default();
    config.max_new_tokens = 6;
    config.num_return_sequences = 2;
    for (int with_top_p = 0; with_top_p < 2; with_top_p++) {
        rlhf_model *m = open_model(ctx, golden[with_top_p]), *fresh = NULL;
        rlhf_sample *s = NULL, *want = NULL;
        int n = 0, count = 0;
        if (with_top_p) config.top_p = 0.9, config.top_k = 40;
        OK(ctx, rlhf_model_clone(m, RLHF_HEAD_LM, &fresh));
        OK(ctx, rlhf_generate(fresh, tok, &config, prompts, 2, &want, &n));
        EACH_OOM(ctx, "generate", {
            status = rlhf_generate(m, tok, &config, prompts, 2, &s, &count);
            if (status) CHECK(!s && !count);
            for (int i = 0; i < count; i++) CHECK_EQ_S(s[i].completion, want[i].completion);
            rlhf_samples_free(ctx, s, count);
        });
        EACH_OOM(ctx, "generate_dataset", {
            status = rlhf_generate_dataset(m, tok, &config, d, &s, &count);
            rlhf_samples_free(ctx, s, count);
        });
        EACH_OOM(ctx, "eval", {
            char *json = NULL;
            status = rlhf_eval(m, text, fresh, &json);
            rlhf_free(ctx, json);
        });
        rlhf_samples_free(ctx, want, n);
        rlhf_model_close(fresh);
        rlhf_model_close(m);
    }
    EACH_OOM(ctx, "info", {
        char *json = NULL;
        status = rlhf_info(ctx, &json);
        rlhf_free(ctx, json);
    });
    rlhf_dataset_close(text);
    rlhf_dataset_close(d);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

/* What the three trainers of the tests below work on. */
typedef struct bench {
    rlhf_ctx *ctx;
    rlhf_tokenizer *tok;
    rlhf_dataset *text, *pairs, *prompts;
    rlhf_model *model, *scorer;
    const char *dir; /* run directory, or "" */
    int save_steps, resume;
    int64_t steps;
} bench;

static bench bench_open(rlhf_ctx *ctx, const char *model) {
    bench b = {.ctx = ctx, .tok = small_tok(ctx), .dir = "", .steps = 2};
    b.text = small_data(ctx, b.tok, RLHF_DATA_SFT, sft_lines);
    b.pairs = small_data(ctx, b.tok, RLHF_DATA_PREFERENCE, pair_lines);
    b.prompts = small_data(ctx, b.tok, RLHF_DATA_PROMPT, prompt_lines);
    b.model = open_model(ctx, model);
    return b;
}

static void bench_close(bench *b) {
    rlhf_model_close(b->scorer);
    rlhf_model_close(b->model);
    rlhf_dataset_close(b->text);
    rlhf_dataset_close(b->pairs);
    rlhf_dataset_close(b->prompts);
    rlhf_tokenizer_close(b->tok);
}

enum { SFT, RM, PPO, STAGES };

/* Opens the trainer of a stage on a model; which for RM is a scorer. */
static rlhf_status bench_trainer(const bench *b, int stage, rlhf_model *m, rlhf_trainer **t) {
    if (stage == SFT) {
        rlhf_sft_config c = rlhf_sft_config_default();
        c.max_steps = b->steps, c.learning_rate = 1e-3, c.per_device_train_batch_size = 3;
        c.output_dir = b->dir, c.save_steps = b->save_steps, c.resume = b->resume;
        c.logging_steps = 1;
        return rlhf_sft_open(m, b->tok, b->text, b->text, &c, t);
    }
    if (stage == RM) {
        rlhf_rm_config c = rlhf_rm_config_default();
        c.max_steps = b->steps, c.learning_rate = 1e-3, c.normalize_samples = 4;
        c.response_length = 5, c.per_device_train_batch_size = 2;
        c.output_dir = b->dir, c.save_steps = b->save_steps, c.resume = b->resume;
        c.logging_steps = 1;
        return rlhf_rm_open(m, b->model, b->tok, b->pairs, b->pairs, &c, t);
    }
    rlhf_ppo_config c = rlhf_ppo_config_default();
    c.max_steps = b->steps, c.learning_rate = 1e-3, c.batch_size = 4, c.num_mini_batches = 2;
    c.num_ppo_epochs = 2, c.response_length = 6, c.per_device_train_batch_size = 2;
    c.output_dir = b->dir, c.save_steps = b->save_steps, c.resume = b->resume;
    return rlhf_ppo_open(m, b->tok, b->prompts, b->scorer, count_letters, NULL, &c, t);
}

static rlhf_model *bench_model(const bench *b, int stage) {
    rlhf_model *m = NULL;
    OK(b->ctx, rlhf_model_clone(b->model, stage == RM ? RLHF_HEAD_SCORE : RLHF_HEAD_LM, &m));
    return m;
}

/* The weights after one step without trouble. */
static const char *bench_step_hash(const bench *b, int stage) {
    rlhf_model *m = bench_model(b, stage);
    rlhf_trainer *t = NULL;
    OK(b->ctx, bench_trainer(b, stage, m, &t));
    OK(b->ctx, rlhf_trainer_step(t));
    const char *hash = hash_of(m);
    rlhf_trainer_close(t);
    rlhf_model_close(m);
    return hash;
}

/* Opening and one step of a stage, with every allocation failing once; the step is then repeated
 * with the same objects and ends in the same weights as without a failure. */
static void oom_stage(int stage, const char *model) {
    rlhf_ctx *ctx = test_context("auto", 1);
    bench b = bench_open(ctx, model);
    if (stage == PPO) { /* with a reward model too */
        OK(ctx, rlhf_model_clone(b.model, RLHF_HEAD_SCORE, &b.scorer));
        rlhf_trainer *t = NULL;
        OK(ctx, bench_trainer(&b, RM, b.scorer, &t));
        OK(ctx, rlhf_trainer_run(t));
        rlhf_trainer_close(t);
    }
    char want[17];
    snprintf(want, sizeof want, "%s", bench_step_hash(&b, stage));
    EACH_OOM(ctx, "trainer_open", {
        test_fail_at(0);
        rlhf_model *m = bench_model(&b, stage);
        rlhf_trainer *t = NULL;
        int64_t live = test_live();
        test_fail_at(oom_n_);
        status = bench_trainer(&b, stage, m, &t);
        if (status) CHECK(!t && test_live() == live);
        rlhf_trainer_close(t);
        rlhf_model_close(m);
    });
    EACH_OOM(ctx, "trainer_step", {
        test_fail_at(0);
        rlhf_model *m = bench_model(&b, stage);
        rlhf_trainer *t = NULL;
        OK(ctx, bench_trainer(&b, stage, m, &t));
        char before[17];
        snprintf(before, sizeof before, "%s", hash_of(m));
        test_fail_at(oom_n_);
        status = rlhf_trainer_step(t);
        bool failed = atomic_load(&test_call_failed);
        test_fail_at(0);
        if (status) {
            CHECK_EQ_I(rlhf_trainer_steps_done(t), 0);
            CHECK_EQ_S(hash_of(m), before);
            OK(ctx, rlhf_trainer_step(t));
        }
        CHECK_EQ_S(hash_of(m), want);
        CHECK_EQ_I(rlhf_trainer_steps_done(t), 1);
        atomic_store(&test_call_failed, failed);
        rlhf_trainer_close(t);
        rlhf_model_close(m);
    });
    bench_close(&b);
    rlhf_close(ctx);
}

TEST(oom_sft) {
    oom_stage(SFT, "test/golden/gpt2");
    if (!test_quick()) oom_stage(SFT, "test/golden/llama");
}
TEST(oom_rm) {
    oom_stage(RM, "test/golden/llama");
    if (!test_quick()) oom_stage(RM, "test/golden/gpt2");
}
TEST(oom_ppo) {
    oom_stage(PPO, "test/golden/llama_tied");
}

static char *slurp(const char *path, size_t *len) {
    FILE *f = fopen(path, "rb");
    *len = 0;
    if (!f) return NULL;
    fseek(f, 0, SEEK_END);
    long n = ftell(f);
    rewind(f);
    char *p = malloc((size_t)n + 1);
    *len = fread(p, 1, (size_t)n, f);
    p[*len] = 0;
    fclose(f);
    return p;
}

static bool same_files(const char *a, const char *b) {
    size_t na, nb;
    char *x = slurp(a, &na), *y = slurp(b, &nb);
    bool same = x && y && na == nb && memcmp(x, y, na) == 0;
    free(x);
    free(y);
    return same;
}

static void check_same_run(int line, const char *a, const char *b) {
    static const char *const names[] = {"model.safetensors", "metrics.jsonl", "config.json"};
    for (int i = 0; i < 3; i++) {
        char x[1024], y[1024];
        snprintf(x, sizeof x, "%s/%s", a, names[i]);
        snprintf(y, sizeof y, "%s/%s", b, names[i]);
        if (!same_files(x, y)) test_fail(__FILE__, line, "%s and %s differ", x, y);
    }
}

/* A whole run with a run directory, in which every allocation fails once: running again goes on
 * with the same trainer and ends in the same files. */
static void oom_run(int stage) {
    rlhf_ctx *ctx = test_context("auto", 1);
    bench b = bench_open(ctx, "test/golden/gpt2");
    char clean[1024], dir[1024];
    snprintf(clean, sizeof clean, "%s/clean", test_dir());
    snprintf(dir, sizeof dir, "%s/run", test_dir());
    b.save_steps = 1;
    b.dir = clean;
    rlhf_model *m = bench_model(&b, stage);
    rlhf_trainer *t = NULL;
    OK(ctx, bench_trainer(&b, stage, m, &t));
    OK(ctx, rlhf_trainer_run(t));
    rlhf_trainer_close(t);
    rlhf_model_close(m);
    b.dir = dir;
    int64_t stride = 1, n = 1;
    for (bool failed = true; failed && test_failures < test_shown; n += stride) {
        m = bench_model(&b, stage);
        t = NULL;
        OK(ctx, bench_trainer(&b, stage, m, &t));
        test_fail_at(n);
        rlhf_status status = rlhf_trainer_run(t);
        failed = atomic_load(&test_call_failed);
        test_fail_at(0);
        CHECK_EQ_I(status, failed ? RLHF_ERR_MEMORY : RLHF_OK);
        if (status) OK(ctx, rlhf_trainer_run(t));
        int before = test_failures;
        check_same_run(__LINE__, dir, clean);
        if (test_failures > before) test_fail(__FILE__, __LINE__, "allocation %d failed", (int)n);
        rlhf_trainer_close(t);
        rlhf_model_close(m);
        test_remove(dir);
        stride = test_quick() || n > 40 ? 7 : 1;
    }
    bench_close(&b);
    rlhf_close(ctx);
}

TEST(oom_run_sft) { oom_run(SFT); }
TEST(oom_run_rm) { oom_run(RM); }

/* ---- arguments ------------------------------------------------------------------------------- */

TEST(statuses_have_texts) {
    CHECK_EQ_S(rlhf_status_text(RLHF_OK), "ok");
    for (int i = 0; i <= RLHF_STOPPED; i++) CHECK(*rlhf_status_text((rlhf_status)i));
    CHECK_EQ_S(rlhf_status_text((rlhf_status)99), "unknown status");
    CHECK_EQ_S(rlhf_status_text((rlhf_status)-1), "unknown status");
    CHECK_EQ_S(rlhf_error(NULL), "");
}

TEST(options_are_checked) {
    rlhf_ctx *ctx = NULL;
    CHECK(rlhf_open(NULL, NULL) == RLHF_ERR_ARG);
    CHECK(rlhf_open(&ctx, NULL) == RLHF_OK && ctx);
    rlhf_close(ctx);
    rlhf_close(NULL);
    rlhf_options o = rlhf_options_default();
    o.isa = "mmx";
    CHECK(rlhf_open(&ctx, &o) == RLHF_ERR_ARG && !ctx);
    o = rlhf_options_default();
    o.threads = -1;
    CHECK(rlhf_open(&ctx, &o) == RLHF_ERR_ARG && !ctx);
    o = rlhf_options_default();
    o.hooks.alloc = test_alloc; /* without free */
    CHECK(rlhf_open(&ctx, &o) == RLHF_ERR_ARG && !ctx);
    char names[128];
    snprintf(names, sizeof names, "%s", rlhf_isas());
    int count = 0;
    for (char *name = strtok(names, " "); name; name = strtok(NULL, " "), count++) {
        o = rlhf_options_default();
        o.isa = name;
        CHECK(rlhf_open(&ctx, &o) == RLHF_OK);
        char *json = NULL;
        OK(ctx, rlhf_info(ctx, &json));
        json_t *j = json_loads(json ? json : "", 0, NULL);
        CHECK_EQ_S(json_string_value(json_object_get(j, "isa")), name);
        CHECK(json_integer_value(json_object_get(j, "threads")) > 0);
        CHECK(json_is_string(json_object_get(j, "cpu")));
        json_decref(j);
        rlhf_free(ctx, json);
        rlhf_free(ctx, NULL);
        rlhf_close(ctx);
    }
    CHECK(count >= 1);
}

TEST(null_arguments) {
    rlhf_ctx *ctx = test_context("auto", 1);
    bench b = bench_open(ctx, golden[0]);
    rlhf_model *m = b.model, *other = NULL;
    rlhf_tokenizer *tok = NULL;
    rlhf_dataset *d = NULL;
    rlhf_sample *s = NULL;
    rlhf_trainer *t = NULL;
    rlhf_data_config dc = rlhf_data_config_default(RLHF_DATA_SFT);
    rlhf_generate_config gc = rlhf_generate_config_default();
    const char *prompts[1] = {"a"};
    const char *texts[1] = {"a"};
    size_t lens[1] = {1};
    int32_t ids[2] = {3, 4};
    float f[2 * 97];
    char *text = NULL, hash[17];
    int n = 0;
#define BAD(call) CHECK_EQ_I(call, RLHF_ERR_ARG)
    BAD(rlhf_info(NULL, &text));
    BAD(rlhf_info(ctx, NULL));
    BAD(rlhf_tokenizer_open(NULL, "x", &tok));
    BAD(rlhf_tokenizer_open(ctx, NULL, &tok));
    BAD(rlhf_tokenizer_open(ctx, "x", NULL));
    BAD(rlhf_tokenizer_train(NULL, texts, lens, 1, 257, &tok));
    BAD(rlhf_tokenizer_train(ctx, NULL, lens, 1, 257, &tok));
    BAD(rlhf_tokenizer_train(ctx, texts, NULL, 1, 257, &tok));
    BAD(rlhf_tokenizer_train(ctx, texts, lens, 1, 257, NULL));
    BAD(rlhf_tokenizer_train(ctx, texts, lens, 1, 256, &tok));
    BAD(rlhf_tokenizer_save(NULL, "x"));
    BAD(rlhf_tokenizer_save(b.tok, NULL));
    BAD(rlhf_encode(NULL, "a", 1, 0, ids, 2, &n));
    BAD(rlhf_encode(b.tok, NULL, 1, 0, ids, 2, &n));
    BAD(rlhf_encode(b.tok, "a", 1, 0, NULL, 2, &n));
    BAD(rlhf_encode(b.tok, "a", 1, 0, ids, 2, NULL));
    BAD(rlhf_decode(NULL, ids, 2, 0, &text, NULL));
    BAD(rlhf_decode(b.tok, NULL, 2, 0, &text, NULL));
    BAD(rlhf_decode(b.tok, ids, -1, 0, &text, NULL));
    BAD(rlhf_decode(b.tok, ids, 2, 0, NULL, NULL));
    BAD(rlhf_dataset_open(NULL, "x", b.tok, &dc, &d));
    BAD(rlhf_dataset_open(ctx, NULL, b.tok, &dc, &d));
    BAD(rlhf_dataset_open(ctx, "x", NULL, &dc, &d));
    BAD(rlhf_dataset_open(ctx, "x", b.tok, NULL, &d));
    BAD(rlhf_dataset_open(ctx, "x", b.tok, &dc, NULL));
    BAD(rlhf_dataset_parse(ctx, NULL, 0, "x", b.tok, &dc, &d));
    BAD(rlhf_dataset_parse(ctx, "{}", 2, NULL, b.tok, &dc, &d));
    BAD(rlhf_model_open(NULL, "x", &other));
    BAD(rlhf_model_open(ctx, NULL, &other));
    BAD(rlhf_model_open(ctx, "x", NULL));
    BAD(rlhf_model_init(ctx, NULL, 0, -1, -1, 1, &other));
    BAD(rlhf_model_clone(NULL, RLHF_HEAD_LM, &other));
    BAD(rlhf_model_clone(m, RLHF_HEAD_LM, NULL));
    BAD(rlhf_model_merge(NULL));
    BAD(rlhf_model_save(NULL, NULL, "x"));
    BAD(rlhf_model_save(m, NULL, NULL));
    BAD(rlhf_model_hash(NULL, hash));
    BAD(rlhf_model_hash(m, NULL));
    BAD(rlhf_model_logits(NULL, ids, 2, f));
    BAD(rlhf_model_logits(m, NULL, 2, f));
    BAD(rlhf_model_logits(m, ids, 0, f));
    BAD(rlhf_model_logits(m, ids, 2, NULL));
    BAD(rlhf_model_logprobs(m, ids, 1, f));
    BAD(rlhf_model_score(NULL, ids, 2, f));
    BAD(rlhf_generate(NULL, b.tok, &gc, prompts, 1, &s, &n));
    BAD(rlhf_generate(m, NULL, &gc, prompts, 1, &s, &n));
    BAD(rlhf_generate(m, b.tok, NULL, prompts, 1, &s, &n));
    BAD(rlhf_generate(m, b.tok, &gc, NULL, 1, &s, &n));
    BAD(rlhf_generate(m, b.tok, &gc, prompts, 0, &s, &n));
    BAD(rlhf_generate(m, b.tok, &gc, prompts, 1, NULL, &n));
    BAD(rlhf_generate_dataset(m, b.tok, &gc, NULL, &s, &n));
    BAD(rlhf_score_dataset(NULL, b.text, f));
    BAD(rlhf_eval(m, NULL, NULL, &text));
    BAD(rlhf_sft_open(m, b.tok, b.text, NULL, NULL, &t));
    BAD(rlhf_sft_open(NULL, b.tok, b.text, NULL, NULL, &t));
    BAD(rlhf_rm_open(m, NULL, b.tok, NULL, NULL, NULL, &t));
    BAD(rlhf_ppo_open(m, b.tok, NULL, NULL, NULL, NULL, NULL, &t));
    BAD(rlhf_trainer_step(NULL));
    BAD(rlhf_trainer_run(NULL));
    BAD(rlhf_trainer_metrics(NULL, &text));
    CHECK_EQ_I(rlhf_trainer_steps_done(NULL), 0);
    CHECK_EQ_I(rlhf_trainer_steps_total(NULL), 0);
    CHECK(isnan(rlhf_trainer_metric(NULL, "loss")));
    CHECK_EQ_I(rlhf_tokenizer_vocab_size(NULL), 0);
    CHECK_EQ_I(rlhf_tokenizer_eos(NULL), -1);
    CHECK_EQ_I(rlhf_tokenizer_bos(NULL), -1);
    CHECK_EQ_I(rlhf_dataset_count(NULL) + rlhf_dataset_dropped(NULL), 0);
    CHECK(rlhf_dataset_record(NULL, 0) == NULL);
    rlhf_trainer_close(NULL);
    rlhf_model_close(NULL);
    rlhf_dataset_close(NULL);
    rlhf_tokenizer_close(NULL);
    rlhf_samples_free(ctx, NULL, 0);
    CHECK(!tok && !d && !s && !t && !other && !text);
    bench_close(&b);
    rlhf_close(ctx);
}

/* The call fails with the status, and the text says what. */
static void check_says(int line, rlhf_ctx *ctx, rlhf_status status, rlhf_status want,
                       const char *what) {
    test_eq_s(__FILE__, line, "status", "expected", rlhf_status_text(status),
              rlhf_status_text(want));
    if (!strstr(rlhf_error(ctx), what))
        test_fail(__FILE__, line, "\"%s\" does not say \"%s\"", rlhf_error(ctx), what);
    if (strchr(rlhf_error(ctx), '\n'))
        test_fail(__FILE__, line, "\"%s\" has several lines", rlhf_error(ctx));
}
#define SAYS(call, want, what) check_says(__LINE__, ctx, call, want, what)

TEST(bad_arguments_have_texts) {
    rlhf_ctx *ctx = test_context("auto", 1);
    bench b = bench_open(ctx, golden[0]);
    rlhf_model *m = b.model, *scorer = NULL, *other = NULL;
    rlhf_trainer *t = NULL;
    int32_t long_ids[65] = {0}, ids[3] = {5, 97, 6};
    static float f[65 * 97];
    char *json = NULL;
    CHECK_EQ_S(rlhf_error(ctx), "");
    SAYS(rlhf_model_logits(m, ids, 3, f), RLHF_ERR_ARG, "97");
    ids[1] = -1;
    SAYS(rlhf_model_logprobs(m, ids, 3, f), RLHF_ERR_ARG, "-1");
    SAYS(rlhf_model_logits(m, long_ids, 65, f), RLHF_ERR_CONTEXT, "64 positions");
    SAYS(rlhf_decode(b.tok, ids, 3, 0, &json, NULL), RLHF_ERR_ARG, "-1");
    SAYS(rlhf_model_score(m, ids, 1, f), RLHF_ERR_ARG, "language model");
    OK(ctx, rlhf_model_clone(m, RLHF_HEAD_SCORE, &scorer));
    CHECK_EQ_S(rlhf_error(ctx), ""); /* a call that succeeds clears the text */
    SAYS(rlhf_model_score(scorer, ids, 1, f), RLHF_ERR_ARG, "never trained");
    SAYS(rlhf_score_dataset(scorer, b.text, f), RLHF_ERR_ARG, "never trained");
    SAYS(rlhf_model_logits(scorer, ids, 1, f), RLHF_ERR_ARG, "reward model");
    SAYS(rlhf_eval(m, b.prompts, NULL, &json), RLHF_ERR_ARG, "prompts");
    SAYS(rlhf_eval(m, b.pairs, NULL, &json), RLHF_ERR_ARG, "reward model");
    SAYS(rlhf_eval(scorer, b.text, NULL, &json), RLHF_ERR_ARG, "language model");

    rlhf_generate_config gc = rlhf_generate_config_default();
    rlhf_sample *s = NULL;
    int n = 0;
    char long_prompt[80];
    memset(long_prompt, 'a', sizeof long_prompt);
    long_prompt[70] = 0;
    const char *prompts[1] = {long_prompt};
    SAYS(rlhf_generate(m, b.tok, &gc, prompts, 1, &s, &n), RLHF_ERR_CONTEXT, "64 positions");
    gc.temperature = -1;
    SAYS(rlhf_generate(m, b.tok, &gc, prompts, 1, &s, &n), RLHF_ERR_ARG, "temperature is -1");
    SAYS(rlhf_generate_dataset(m, b.tok, &gc, b.text, &s, &n), RLHF_ERR_ARG, "RLHF_DATA_PROMPT");

    rlhf_sft_config sc = rlhf_sft_config_default();
    SAYS(rlhf_sft_open(m, b.tok, b.pairs, NULL, &sc, &t), RLHF_ERR_ARG, "RLHF_DATA_SFT");
    SAYS(rlhf_sft_open(scorer, b.tok, b.text, NULL, &sc, &t), RLHF_ERR_ARG, "language model");
    sc.learning_rate = NAN;
    SAYS(rlhf_sft_open(m, b.tok, b.text, NULL, &sc, &t), RLHF_ERR_ARG, "learning_rate");
    sc = rlhf_sft_config_default();
    sc.lr_scheduler_type = "exponential";
    SAYS(rlhf_sft_open(m, b.tok, b.text, NULL, &sc, &t), RLHF_ERR_ARG, "linear|cosine|constant");
    sc.lr_scheduler_type = NULL;
    SAYS(rlhf_sft_open(m, b.tok, b.text, NULL, &sc, &t), RLHF_ERR_ARG, "lr_scheduler_type");

    rlhf_rm_config rc = rlhf_rm_config_default();
    SAYS(rlhf_rm_open(m, NULL, b.tok, b.pairs, NULL, &rc, &t), RLHF_ERR_ARG, "score head");
    SAYS(rlhf_rm_open(scorer, NULL, b.tok, b.text, NULL, &rc, &t), RLHF_ERR_ARG, "PREFERENCE");

    rlhf_ppo_config pc = rlhf_ppo_config_default();
    pc.response_length = 5;
    SAYS(rlhf_ppo_open(m, b.tok, b.prompts, NULL, NULL, NULL, &pc, &t), RLHF_ERR_ARG,
         "reward function");
    SAYS(rlhf_ppo_open(m, b.tok, b.text, NULL, count_letters, NULL, &pc, &t), RLHF_ERR_ARG,
         "prompts");
    SAYS(rlhf_ppo_open(m, b.tok, b.prompts, scorer, NULL, NULL, &pc, &t), RLHF_ERR_ARG,
         "never trained");
    SAYS(rlhf_ppo_open(m, b.tok, b.prompts, m, NULL, NULL, &pc, &t), RLHF_ERR_ARG,
         "language model");
    pc.num_mini_batches = 3;
    SAYS(rlhf_ppo_open(m, b.tok, b.prompts, NULL, count_letters, NULL, &pc, &t), RLHF_ERR_ARG,
         "multiple");
    pc = rlhf_ppo_config_default();
    pc.response_length = 60;
    SAYS(rlhf_ppo_open(m, b.tok, b.prompts, NULL, count_letters, NULL, &pc, &t), RLHF_ERR_CONTEXT,
         "64 positions");

    SAYS(rlhf_model_open(ctx, "/nowhere", &other), RLHF_ERR_IO, "/nowhere: ");
    SAYS(rlhf_model_open(ctx, test_dir(), &other), RLHF_ERR_IO, "config.json");
    rlhf_model *untied = open_model(ctx, golden[1]), *copy = NULL;
    rlhf_model_close(scorer);
    OK(ctx, rlhf_model_clone(untied, RLHF_HEAD_SCORE, &scorer));
    SAYS(rlhf_model_clone(scorer, RLHF_HEAD_LM, &copy), RLHF_ERR_ARG, "output matrix");
    CHECK(!t && !s && !json && !other && !copy);
    rlhf_model_close(untied);
    rlhf_model_close(scorer);
    bench_close(&b);
    rlhf_close(ctx);
}

/* A run that is over, and data the model cannot take, change nothing. */
TEST(trainers_refuse) {
    rlhf_ctx *ctx = test_context("auto", 1);
    bench b = bench_open(ctx, golden[0]);
    rlhf_trainer *t = NULL;
    b.steps = 1;
    OK(ctx, bench_trainer(&b, SFT, b.model, &t));
    CHECK_EQ_I(rlhf_trainer_steps_total(t), 1);
    OK(ctx, rlhf_trainer_step(t));
    SAYS(rlhf_trainer_step(t), RLHF_ERR_ARG, "all 1 steps are done");
    OK(ctx, rlhf_trainer_run(t));
    CHECK(isfinite(rlhf_trainer_metric(t, "loss")));
    CHECK(isnan(rlhf_trainer_metric(t, "no such")));
    CHECK(isnan(rlhf_trainer_metric(t, NULL)));
    char *json = NULL;
    OK(ctx, rlhf_trainer_metrics(t, &json));
    json_t *j = json_loads(json ? json : "", 0, NULL);
    CHECK_NEAR(json_number_value(json_object_get(j, "loss")), rlhf_trainer_metric(t, "loss"), 0);
    json_decref(j);
    rlhf_free(ctx, json);
    rlhf_trainer_close(t);
    char line[160];
    memset(line, 'a', sizeof line);
    memcpy(line, "{'text':'", 9);
    memcpy(line + 140, "'}\n", 4);
    rlhf_dataset *wide = small_data(ctx, b.tok, RLHF_DATA_SFT, line);
    rlhf_sft_config c = rlhf_sft_config_default();
    SAYS(rlhf_sft_open(b.model, b.tok, wide, NULL, &c, &t), RLHF_ERR_CONTEXT, "64 positions");
    SAYS(rlhf_eval(b.model, wide, NULL, &json), RLHF_ERR_CONTEXT, "64 positions");
    rlhf_dataset_close(wide);
    bench_close(&b);
    rlhf_close(ctx);
}

/* ---- configurations -------------------------------------------------------------------------- */

TEST(configurations_are_consistent) {
    rlhf_sft_config sft = rlhf_sft_config_default();
    rlhf_rm_config rm = rlhf_rm_config_default();
    rlhf_ppo_config ppo = rlhf_ppo_config_default();
    rlhf_generate_config gen = rlhf_generate_config_default();
    const void *configs[] = {&sft, &rm, &ppo, &gen};
    size_t sizes[] = {sizeof sft, sizeof rm, sizeof ppo, sizeof gen};
    for (int k = 0; k < 4; k++) {
        int n = 0;
        const rlhf_field *f = rlhf_config_fields((rlhf_config_kind)k, &n);
        CHECK(n > 5 && n <= 64);
        size_t end = 0;
        for (int i = 0; i < n; i++) {
            const char *at = (const char *)configs[k] + f[i].offset;
            if (!f[i].help || strlen(f[i].help) < 3 || strchr(f[i].help, '\n'))
                test_fail(__FILE__, __LINE__, "%s has no help", f[i].name);
            if (f[i].offset < end) test_fail(__FILE__, __LINE__, "%s: offset", f[i].name);
            int64_t integer;
            double real;
            int boolean;
            const char *text;
            switch (f[i].kind) {
            case 'I':
                memcpy(&integer, at, sizeof integer);
                CHECK_NEAR(integer, f[i].def, 0);
                CHECK(f[i].def == floor(f[i].def));
                end = f[i].offset + sizeof integer;
                break;
            case 'R':
                memcpy(&real, at, sizeof real);
                CHECK_NEAR(real, f[i].def, 0);
                end = f[i].offset + sizeof real;
                break;
            case 'B':
                memcpy(&boolean, at, sizeof boolean);
                CHECK_EQ_I(boolean, f[i].def);
                CHECK(f[i].min == 0 && f[i].max == 1);
                end = f[i].offset + sizeof boolean;
                break;
            case 'S':
                memcpy(&text, at, sizeof text);
                CHECK_EQ_S(text, f[i].text);
                CHECK(!f[i].choices || base_is_choice(f[i].choices, text));
                end = f[i].offset + sizeof text;
                break;
            default: test_fail(__FILE__, __LINE__, "%s: kind %c", f[i].name, f[i].kind);
            }
            if (f[i].kind != 'S' && !(f[i].def >= f[i].min && f[i].def <= f[i].max))
                test_fail(__FILE__, __LINE__, "%s: the default is out of range", f[i].name);
            for (int other = 0; other < i; other++)
                if (!strcmp(f[i].name, f[other].name))
                    test_fail(__FILE__, __LINE__, "%s stands twice", f[i].name);
        }
        CHECK(end <= sizes[k]);
    }
    CHECK(base_is_choice("a|bc|d", "bc") && !base_is_choice("a|bc|d", "b"));
    CHECK(!base_is_choice("a|bc|d", "") && !base_is_choice("a|bc|d", "a|bc"));
}

/* ---- contexts and hooks ---------------------------------------------------------------------- */

typedef struct job {
    int index;
    char hash[17];
} job;

/* Trains and samples in a context of its own, in the way its index says. */
static void *work(void *arg) {
    job *j = arg;
    rlhf_options options = rlhf_options_default();
    rlhf_ctx *ctx = NULL;
    options.threads = 2;
    options.hooks = test_hooks();
    if (rlhf_open(&ctx, &options) != RLHF_OK) return NULL;
    const char *texts[1] = {"the cat sat on the mat and the hat of the cat is on the mat"};
    size_t lens[1] = {strlen(texts[0])};
    rlhf_tokenizer *tok = NULL;
    rlhf_model *m = NULL;
    rlhf_dataset *d = NULL;
    rlhf_trainer *t = NULL;
    rlhf_sample *s = NULL;
    int n = 0, ok = 1;
    const char *lines = "{\"text\":\"the cat sat\"}\n{\"text\":\"on the mat\"}\n";
    const char *prompts[2] = {"the", "a cat"};
    rlhf_data_config dc = rlhf_data_config_default(RLHF_DATA_SFT);
    rlhf_sft_config sc = rlhf_sft_config_default();
    rlhf_generate_config gc = rlhf_generate_config_default();
    sc.max_steps = 6 + j->index;
    sc.learning_rate = 1e-3;
    gc.max_new_tokens = 8;
    const char *config = j->index % 2 ? "test/golden/llama/config.json"
                                      : "test/golden/gpt2/config.json";
    ok = ok && !rlhf_tokenizer_train(ctx, texts, lens, 1, 280, &tok);
    ok = ok && !rlhf_model_init(ctx, config, 280, -1, rlhf_tokenizer_eos(tok), 7, &m);
    ok = ok && !rlhf_dataset_parse(ctx, lines, strlen(lines), "x", tok, &dc, &d);
    ok = ok && !rlhf_sft_open(m, tok, d, NULL, &sc, &t);
    ok = ok && !rlhf_trainer_run(t);
    for (int i = 0; ok && i < 5; i++) {
        ok = !rlhf_generate(m, tok, &gc, prompts, 2, &s, &n) && n == 2;
        rlhf_samples_free(ctx, s, n);
    }
    if (!ok || rlhf_model_hash(m, j->hash)) snprintf(j->hash, sizeof j->hash, "failed");
    rlhf_trainer_close(t);
    rlhf_dataset_close(d);
    rlhf_model_close(m);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
    return NULL;
}

TEST(contexts_on_threads_are_independent) {
    enum { JOBS = 4 };
    job alone[JOBS], together[JOBS];
    pthread_t thread[JOBS];
    for (int i = 0; i < JOBS; i++) {
        alone[i] = together[i] = (job){.index = i};
        work(&alone[i]);
        CHECK(strcmp(alone[i].hash, "failed") != 0);
    }
    CHECK(strcmp(alone[0].hash, alone[2].hash) != 0);
    for (int i = 0; i < JOBS; i++) REQUIRE(!pthread_create(&thread[i], NULL, work, &together[i]));
    for (int i = 0; i < JOBS; i++) pthread_join(thread[i], NULL);
    for (int i = 0; i < JOBS; i++) CHECK_EQ_S(together[i].hash, alone[i].hash);
}

/* Two contexts that take turns on one thread. */
TEST(contexts_take_turns) {
    rlhf_ctx *a = test_context("auto", 1), *b = test_context("auto", 1);
    rlhf_model *m = open_model(a, golden[0]), *x = NULL;
    CHECK(rlhf_model_open(b, "/nowhere", &x) == RLHF_ERR_IO);
    CHECK_EQ_S(rlhf_error(a), "");
    CHECK(strstr(rlhf_error(b), "/nowhere") != NULL);
    rlhf_model *n = open_model(b, golden[0]);
    CHECK_EQ_S(hash_of(m), hash_of(n));
    rlhf_model_close(n);
    rlhf_close(b);
    rlhf_model_close(m);
    rlhf_close(a);
}

typedef struct hooked {
    int logs, calls, stop_at;
    int64_t done, total;
    char what[16], metrics[2048];
} hooked;

static void hook_log(void *user, rlhf_level level, const char *text) {
    hooked *h = user;
    (void)level;
    h->logs += *text != 0;
}

static int hook_progress(void *user, const rlhf_progress *p) {
    hooked *h = user;
    h->calls++;
    h->done = p->done;
    h->total = p->total;
    snprintf(h->what, sizeof h->what, "%s", p->what);
    if (p->metrics) snprintf(h->metrics, sizeof h->metrics, "%s", p->metrics);
    return h->stop_at && h->calls >= h->stop_at;
}

static rlhf_ctx *hooked_ctx(hooked *h) {
    rlhf_options options = rlhf_options_default();
    rlhf_ctx *ctx = NULL;
    options.threads = 1;
    options.hooks = test_hooks();
    options.hooks.user = h;
    options.hooks.log = hook_log;
    options.hooks.progress = hook_progress;
    CHECK(rlhf_open(&ctx, &options) == RLHF_OK);
    return ctx;
}

/* Stopped by the hook after every step, each time in a new trainer that resumes: the end is the
 * uninterrupted run's, byte for byte. */
static void stop_and_resume(int stage, const char *model) {
    hooked h = {0};
    rlhf_ctx *ctx = hooked_ctx(&h);
    bench b = bench_open(ctx, model);
    char clean[1024], dir[1024];
    snprintf(clean, sizeof clean, "%s/clean%d", test_dir(), stage);
    snprintf(dir, sizeof dir, "%s/run%d", test_dir(), stage);
    b.steps = 5;
    b.dir = clean;
    rlhf_model *m = bench_model(&b, stage);
    rlhf_trainer *t = NULL;
    OK(ctx, bench_trainer(&b, stage, m, &t));
    OK(ctx, rlhf_trainer_run(t));
    CHECK_EQ_I(h.done, 5);
    CHECK_EQ_I(h.total, 5);
    CHECK(h.calls >= 5);
    json_t *j = json_loads(h.metrics, 0, NULL);
    CHECK(json_integer_value(json_object_get(j, "step")) == 5);
    json_decref(j);
    rlhf_trainer_close(t);
    char want[17];
    snprintf(want, sizeof want, "%s", hash_of(m));
    rlhf_model_close(m);
    b.dir = dir;
    rlhf_status status = RLHF_STOPPED;
    int rounds = 0;
    for (; status == RLHF_STOPPED && rounds < 9; rounds++) {
        m = bench_model(&b, stage);
        t = NULL;
        OK(ctx, bench_trainer(&b, stage, m, &t));
        h.calls = 0;
        h.stop_at = 1;
        int64_t before = rounds;
        status = rlhf_trainer_run(t);
        if (status == RLHF_STOPPED) {
            CHECK(*rlhf_error(ctx));
            CHECK_EQ_I(rlhf_trainer_steps_done(t), before + 1);
        } else CHECK_EQ_S(hash_of(m), want);
        rlhf_trainer_close(t);
        rlhf_model_close(m);
        b.resume = 1;
    }
    CHECK_EQ_I(status, RLHF_OK);
    CHECK_EQ_I(rounds, 5);
    check_same_run(__LINE__, dir, clean);
    bench_close(&b);
    rlhf_close(ctx);
}

TEST(stop_and_resume_sft) { stop_and_resume(SFT, golden[0]); }
TEST(stop_and_resume_rm) { stop_and_resume(RM, golden[1]); }
TEST(stop_and_resume_ppo) { stop_and_resume(PPO, golden[2]); }

/* Resuming a run that is over changes none of its files. */
TEST(resuming_a_finished_run_changes_nothing) {
    for (int stage = 0; stage < STAGES; stage++) {
        rlhf_ctx *ctx = test_context("auto", 1);
        bench b = bench_open(ctx, golden[0]);
        char clean[1024], dir[1024];
        snprintf(clean, sizeof clean, "%s/clean%d", test_dir(), stage);
        snprintf(dir, sizeof dir, "%s/run%d", test_dir(), stage);
        for (int round = 0; round < 3; round++) {
            b.dir = round ? dir : clean;
            b.save_steps = 1;
            b.resume = round == 2;
            rlhf_model *m = bench_model(&b, stage);
            rlhf_trainer *t = NULL;
            OK(ctx, bench_trainer(&b, stage, m, &t));
            OK(ctx, rlhf_trainer_run(t));
            rlhf_trainer_close(t);
            rlhf_model_close(m);
            if (round) check_same_run(__LINE__, dir, clean);
        }
        bench_close(&b);
        rlhf_close(ctx);
    }
}

/* One context, alternately interrupted while it samples. */
TEST(progress_stops_generation) {
    hooked h = {.stop_at = 2};
    rlhf_ctx *ctx = hooked_ctx(&h);
    rlhf_tokenizer *tok = small_tok(ctx);
    rlhf_model *m = open_model(ctx, golden[0]);
    rlhf_generate_config c = rlhf_generate_config_default();
    const char *prompts[1] = {"hello"};
    rlhf_sample *s = NULL;
    int n = 0;
    c.max_new_tokens = 20;
    c.seed = 5;
    rlhf_status status = rlhf_generate(m, tok, &c, prompts, 1, &s, &n);
    CHECK(status == RLHF_STOPPED && !s && n == 0);
    CHECK_EQ_S(h.what, "generate");
    h.stop_at = 0;
    OK(ctx, rlhf_generate(m, tok, &c, prompts, 1, &s, &n));
    CHECK_EQ_I(n, 1);
    rlhf_samples_free(ctx, s, n);
    rlhf_model_close(m);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

/* A reward function that uses the library, with the policy itself, on the same context. */
typedef struct inside {
    rlhf_ctx *ctx;
    rlhf_model *policy;
    rlhf_tokenizer *tok;
    int calls, fail;
} inside;

static rlhf_status call_back(void *user, const rlhf_sample *s, int n, float *reward) {
    inside *c = user;
    c->calls++;
    for (int i = 0; i < n; i++) {
        int total = s[i].n_prompt + s[i].n_completion;
        float logp[64];
        double sum = 0;
        char *text = NULL;
        rlhf_model *none = NULL;
        CHECK(s[i].prompt_ids + s[i].n_prompt == s[i].completion_ids);
        OK(c->ctx, rlhf_model_logprobs(c->policy, s[i].prompt_ids, total, logp));
        for (int t = s[i].n_prompt - 1; t < total - 1; t++) sum += (double)logp[t];
        CHECK_NEAR(sum, s[i].logprob, 1e-4);
        OK(c->ctx, rlhf_decode(c->tok, s[i].completion_ids, s[i].n_completion, 1, &text, NULL));
        CHECK_EQ_S(text, s[i].completion);
        rlhf_free(c->ctx, text);
        /* A call that fails in here is no failure of the step. */
        CHECK(rlhf_model_open(c->ctx, "/nowhere", &none) == RLHF_ERR_IO);
        CHECK(s[i].record && strstr(s[i].record, "\"prompt\"") && s[i].prompt);
        reward[i] = i ? (float)sum : NAN;
    }
    const char *prompts[1] = {"x"};
    rlhf_generate_config g = rlhf_generate_config_default();
    rlhf_sample *out = NULL;
    int count = 0;
    g.max_new_tokens = 3;
    OK(c->ctx, rlhf_generate(c->policy, c->tok, &g, prompts, 1, &out, &count));
    rlhf_samples_free(c->ctx, out, count);
    return c->fail ? RLHF_ERR_IO : RLHF_OK;
}

TEST(reward_function_calls_the_library) {
    rlhf_ctx *ctx = test_context("auto", 1);
    bench b = bench_open(ctx, golden[1]);
    inside c = {ctx, b.model, b.tok, 0, 0};
    rlhf_ppo_config p = rlhf_ppo_config_default();
    rlhf_trainer *t = NULL;
    p.max_steps = 3, p.batch_size = 4, p.response_length = 6, p.temperature = 1;
    p.learning_rate = 1e-3;
    OK(ctx, rlhf_ppo_open(b.model, b.tok, b.prompts, NULL, call_back, &c, &p, &t));
    OK(ctx, rlhf_trainer_step(t));
    CHECK_EQ_I(c.calls, 1);
    CHECK_NEAR(rlhf_trainer_metric(t, "val/ratio_first"), 1, 0);
    char before[17];
    snprintf(before, sizeof before, "%s", hash_of(b.model));
    c.fail = 1;
    SAYS(rlhf_trainer_step(t), RLHF_ERR_CALLBACK, "reward function failed");
    CHECK_EQ_S(hash_of(b.model), before);
    CHECK_EQ_I(rlhf_trainer_steps_done(t), 1);
    c.fail = 0;
    OK(ctx, rlhf_trainer_step(t));
    CHECK_EQ_I(rlhf_trainer_steps_done(t), 2);
    rlhf_trainer_close(t);
    bench_close(&b);
    rlhf_close(ctx);
}

TEST(log_hook) {
    hooked h = {0};
    rlhf_ctx *ctx = hooked_ctx(&h);
    rlhf_tokenizer *tok = small_tok(ctx);
    rlhf_data_config c = rlhf_data_config_default(RLHF_DATA_SFT);
    rlhf_dataset *d = NULL;
    c.max_length = 4;
    const char *lines = "{\"text\":\"ab\"}\n{\"text\":\"too long for this\"}\n";
    OK(ctx, rlhf_dataset_parse(ctx, lines, strlen(lines), "x", tok, &c, &d));
    CHECK_EQ_I(h.logs, 2); /* the record, at the level of details, and a warning of how many */
    rlhf_dataset_close(d);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

/* ---- checkpoints ----------------------------------------------------------------------------- */

/* Closing the context gives back what the caller forgot. */
TEST(close_gives_everything_back) {
    rlhf_ctx *ctx = test_context("auto", 1);
    char *json = NULL;
    int32_t ids[3] = {3, 4, 5};
    rlhf_tokenizer *tok = small_tok(ctx);
    OK(ctx, rlhf_decode(tok, ids, 3, 0, &json, NULL));
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
    CHECK_EQ_I(test_live(), 0);
}

TEST(save_and_open_gives_the_same_bits) {
    for (size_t i = 0; i < sizeof golden / sizeof *golden; i++) {
        rlhf_ctx *ctx = test_context("auto", 1);
        rlhf_tokenizer *tok = small_tok(ctx);
        rlhf_model *m = open_model(ctx, golden[i]), *scorer = NULL;
        char dir[1024], again[1024], a[1100], b[1100];
        snprintf(dir, sizeof dir, "%s/%zu/deep/er", test_dir(), i);
        snprintf(again, sizeof again, "%s/%zu/again/", test_dir(), i);
        OK(ctx, rlhf_model_save(m, tok, dir));
        rlhf_model *back = open_model(ctx, dir);
        CHECK_EQ_S(hash_of(back), hash_of(m));
        int32_t ids[7] = {3, 96, 0, 55, 2, 1, 17};
        float x[7 * 97], y[7 * 97];
        OK(ctx, rlhf_model_logits(m, ids, 7, x));
        OK(ctx, rlhf_model_logits(back, ids, 7, y));
        CHECK_BITS(x, y, 7 * 97);
        OK(ctx, rlhf_model_save(back, tok, again));
        static const char *const names[] = {"model.safetensors", "config.json", "tokenizer.json",
                                            "generation_config.json", "tokenizer_config.json"};
        for (int k = 0; k < 5; k++) {
            snprintf(a, sizeof a, "%s/%s", dir, names[k]);
            snprintf(b, sizeof b, "%s/%s", again, names[k]);
            if (!same_files(a, b)) test_fail(__FILE__, __LINE__, "%s and %s differ", a, b);
        }
        rlhf_tokenizer *tok2 = NULL;
        OK(ctx, rlhf_tokenizer_open(ctx, dir, &tok2));
        CHECK_EQ_I(rlhf_tokenizer_eos(tok2), rlhf_tokenizer_eos(tok));
        CHECK_EQ_I(rlhf_tokenizer_vocab_size(tok2), rlhf_tokenizer_vocab_size(tok));
        rlhf_tokenizer_close(tok2);
        rlhf_model_shape p = rlhf_model_get_shape(m), q = rlhf_model_get_shape(back);
        CHECK_EQ_S(p.model_type, q.model_type);
        CHECK_EQ_I(p.n_params, q.n_params);
        CHECK(p.tied == q.tied && p.max_positions == q.max_positions && p.head == q.head);
        /* A scorer whose head is untrained stays one. */
        OK(ctx, rlhf_model_clone(m, RLHF_HEAD_SCORE, &scorer));
        CHECK_EQ_S(hash_of(m), hash_of(back));
        OK(ctx, rlhf_model_save(scorer, NULL, test_path("scorer")));
        rlhf_model *untrained = open_model(ctx, test_path("scorer"));
        CHECK_EQ_I(rlhf_model_get_shape(untrained).head, RLHF_HEAD_SCORE);
        SAYS(rlhf_model_score(untrained, ids, 3, x), RLHF_ERR_ARG, "never trained");
        rlhf_model_close(untrained);
        rlhf_model_close(scorer);
        rlhf_model_close(back);
        rlhf_model_close(m);
        rlhf_tokenizer_close(tok);
        rlhf_close(ctx);
    }
}

/* A trained scorer keeps its head, its normalisation and its scores. */
TEST(scorers_there_and_back) {
    rlhf_ctx *ctx = test_context("auto", 1);
    bench b = bench_open(ctx, golden[0]);
    rlhf_trainer *t = NULL;
    rlhf_model *m = bench_model(&b, RM), *copy = NULL;
    b.steps = 3;
    OK(ctx, bench_trainer(&b, RM, m, &t));
    OK(ctx, rlhf_trainer_run(t));
    rlhf_trainer_close(t);
    OK(ctx, rlhf_model_save(m, b.tok, test_path("rm")));
    rlhf_model *back = open_model(ctx, test_path("rm"));
    OK(ctx, rlhf_model_clone(m, RLHF_HEAD_SCORE, &copy));
    int32_t ids[5] = {4, 5, 6, 7, 8};
    float x[3];
    OK(ctx, rlhf_model_score(m, ids, 5, x));
    OK(ctx, rlhf_model_score(back, ids, 5, x + 1));
    OK(ctx, rlhf_model_score(copy, ids, 5, x + 2));
    CHECK(isfinite(x[0]));
    CHECK_BITS(x, x + 1, 1);
    CHECK_BITS(x, x + 2, 1);
    CHECK_EQ_S(hash_of(m), hash_of(back));
    CHECK_EQ_S(hash_of(m), hash_of(copy));
    /* The dataset's scores are those of one record alone. */
    rlhf_dataset *d = small_data(ctx, b.tok, RLHF_DATA_SCORE, sft_lines);
    float all[4], one;
    OK(ctx, rlhf_score_dataset(m, d, all));
    for (int i = 0; i < 4; i++) {
        OK(ctx, rlhf_model_score(m, d->record[i].a.ids, d->record[i].a.n, &one));
        CHECK_BITS(&one, all + i, 1);
    }
    rlhf_dataset_close(d);
    rlhf_model_close(copy);
    rlhf_model_close(back);
    rlhf_model_close(m);
    bench_close(&b);
    rlhf_close(ctx);
}

/* A copy shares nothing: training it leaves the original alone. */
TEST(clones_share_nothing) {
    rlhf_ctx *ctx = test_context("auto", 1);
    bench b = bench_open(ctx, golden[2]);
    char before[17];
    snprintf(before, sizeof before, "%s", hash_of(b.model));
    rlhf_model *m = bench_model(&b, SFT);
    rlhf_trainer *t = NULL;
    OK(ctx, bench_trainer(&b, SFT, m, &t));
    OK(ctx, rlhf_trainer_run(t));
    rlhf_trainer_close(t);
    CHECK(strcmp(hash_of(m), before) != 0);
    CHECK_EQ_S(hash_of(b.model), before);
    rlhf_model_close(b.model);
    b.model = NULL;
    float f[2 * 97];
    int32_t ids[2] = {5, 6};
    OK(ctx, rlhf_model_logits(m, ids, 2, f));
    rlhf_model_close(m);
    bench_close(&b);
    rlhf_close(ctx);
}

/* The nearest half-precision number (ties to even) of a number whose half is normal. */
static uint16_t to_half(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    uint32_t sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a < 0x38800000) { /* subnormal halves are multiples of 2^-24 */
        float n = fabsf(x) * 0x1p24f;
        return (uint16_t)(sign | (uint32_t)lrintf(n));
    }
    uint32_t r = a + 0xfff + (a >> 13 & 1);
    return (uint16_t)(sign | ((r >> 13) - (112 << 10)));
}

static uint16_t to_bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static float half_value(uint16_t h) {
    int e = h >> 10 & 31;
    float m = (float)(h & 1023), v = e ? ldexpf(1024 + m, e - 25) : ldexpf(m, -24);
    return h & 0x8000 ? -v : v;
}

/* Rewrites a safetensors file of F32 tensors with another dtype, tensor by tensor in the order of
 * its header, written by hand; exact: where not null, the same with the rounded values as F32. */
static void rewrite(const char *from, const char *dtype, const char *to, const char *exact) {
    size_t len;
    char *file = slurp(from, &len);
    REQUIRE(file != NULL);
    uint64_t head = 0;
    memcpy(&head, file, 8);
    json_t *j = json_loadb(file + 8, (size_t)head, 0, NULL), *entry;
    const char *name;
    int half = !strcmp(dtype, "F16");
    char *h16 = calloc(1, 1 << 20), *h32 = calloc(1, 1 << 20);
    unsigned char *d16 = malloc(len), *d32 = malloc(len);
    size_t n16 = 0, n32 = 0, a = (size_t)sprintf(h16, "{"), b = (size_t)sprintf(h32, "{");
    json_object_foreach(j, name, entry) {
        if (!strcmp(name, "__metadata__")) continue;
        char *shape = json_dumps(json_object_get(entry, "shape"), JSON_COMPACT);
        json_t *offsets = json_object_get(entry, "data_offsets");
        size_t lo = (size_t)json_integer_value(json_array_get(offsets, 0));
        size_t hi = (size_t)json_integer_value(json_array_get(offsets, 1)), n = (hi - lo) / 4;
        a += (size_t)sprintf(h16 + a, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":"
                                      "[%zu,%zu]}",
                             n16 ? "," : "", name, dtype, shape, n16, n16 + 2 * n);
        b += (size_t)sprintf(h32 + b, "%s\"%s\":{\"shape\":%s,\"dtype\":\"F32\",\"data_offsets\":"
                                      "[%zu,%zu]}",
                             n32 ? "," : "", name, shape, n32, n32 + 4 * n);
        for (size_t i = 0; i < n; i++) {
            float x;
            memcpy(&x, file + 8 + head + lo + 4 * i, 4);
            uint16_t u = half ? to_half(x) : to_bf16(x);
            uint32_t wide = (uint32_t)u << 16;
            if (half) x = half_value(u);
            else memcpy(&x, &wide, 4);
            memcpy(d16 + n16 + 2 * i, &u, 2);
            memcpy(d32 + n32 + 4 * i, &x, 4);
        }
        n16 += 2 * n;
        n32 += 4 * n;
        free(shape);
    }
    a += (size_t)sprintf(h16 + a, "}");
    b += (size_t)sprintf(h32 + b, "}   ");
    FILE *f = fopen(to, "wb"), *g = fopen(exact, "wb");
    CHECK(f && g);
    if (f) fwrite(&a, 1, 8, f), fwrite(h16, 1, a, f), fwrite(d16, 1, n16, f), fclose(f);
    if (g) fwrite(&b, 1, 8, g), fwrite(h32, 1, b, g), fwrite(d32, 1, n32, g), fclose(g);
    json_decref(j);
    free(file);
    free(h16);
    free(h32);
    free(d16);
    free(d32);
}

static void copy_file(const char *from, const char *to) {
    size_t len;
    char *p = slurp(from, &len);
    FILE *f = fopen(to, "wb");
    CHECK(p && f);
    if (f) fwrite(p, 1, len, f), fclose(f);
    free(p);
}

/* Every tensor of the file `from` is in the file `to`, byte for byte. */
static void same_tensors(const char *from, const char *to) {
    size_t na, nb;
    char *a = slurp(from, &na), *b = slurp(to, &nb);
    REQUIRE(a && b);
    uint64_t ha, hb;
    memcpy(&ha, a, 8);
    memcpy(&hb, b, 8);
    CHECK_EQ_I(hb % 8, 0);
    json_t *ja = json_loadb(a + 8, (size_t)ha, 0, NULL);
    json_t *jb = json_loadb(b + 8, (size_t)hb, 0, NULL), *entry;
    const char *name;
    int count = 0;
    json_object_foreach(ja, name, entry) {
        if (!strcmp(name, "__metadata__")) continue;
        json_t *other = json_object_get(jb, name);
        if (!other) {
            test_fail(__FILE__, __LINE__, "%s is not in %s", name, to);
            continue;
        }
        count++;
        CHECK(json_equal(json_object_get(entry, "shape"), json_object_get(other, "shape")));
        CHECK(json_equal(json_object_get(entry, "dtype"), json_object_get(other, "dtype")));
        json_t *oa = json_object_get(entry, "data_offsets");
        json_t *ob = json_object_get(other, "data_offsets");
        size_t lo = (size_t)json_integer_value(json_array_get(oa, 0));
        size_t hi = (size_t)json_integer_value(json_array_get(oa, 1));
        size_t at = (size_t)json_integer_value(json_array_get(ob, 0));
        if (memcmp(a + 8 + ha + lo, b + 8 + hb + at, hi - lo))
            test_fail(__FILE__, __LINE__, "%s differs", name);
    }
    CHECK(count > 12);
    json_decref(ja);
    json_decref(jb);
    free(a);
    free(b);
}

/* F16 and BF16 weights are read exactly: they give the hash of the same numbers as F32. */
TEST(half_precision_is_read_exactly) {
    static const char *const dtypes[] = {"F16", "BF16"};
    for (size_t i = 0; i < sizeof golden / sizeof *golden; i++)
        for (int k = 0; k < 2; k++) {
            rlhf_ctx *ctx = test_context("auto", 1);
            char from[1024], config[1024], dir[2][1024], file[2][1100], path[1100];
            snprintf(from, sizeof from, "%s/model.safetensors", golden[i]);
            snprintf(config, sizeof config, "%s/config.json", golden[i]);
            for (int s = 0; s < 2; s++) {
                snprintf(dir[s], sizeof dir[s], "%s/%zu-%d-%d", test_dir(), i, k, s);
                mkdir(dir[s], 0777);
                snprintf(path, sizeof path, "%s/config.json", dir[s]);
                copy_file(config, path);
                snprintf(file[s], sizeof file[s], "%s/model.safetensors", dir[s]);
            }
            rewrite(from, dtypes[k], file[0], file[1]);
            rlhf_model *half = open_model(ctx, dir[0]), *exact = open_model(ctx, dir[1]);
            rlhf_model *full = open_model(ctx, golden[i]);
            CHECK_EQ_S(hash_of(half), hash_of(exact));
            CHECK(strcmp(hash_of(half), hash_of(full)) != 0);
            /* What is saved is the same again, byte for byte; what was changed is F32. */
            OK(ctx, rlhf_model_save(half, NULL, test_path("saved")));
            snprintf(path, sizeof path, "%s/saved/model.safetensors", test_dir());
            same_tensors(file[0], path);
            model_thaw(half);
            model_w(half, P_WTE, 0)[7] += 1e-7f;
            OK(ctx, rlhf_model_save(half, NULL, test_path("changed")));
            rlhf_model *changed = open_model(ctx, test_path("changed"));
            CHECK_EQ_S(hash_of(changed), hash_of(half));
            rlhf_model_close(changed);
            model_w(half, P_WTE, 0)[7] -= 1e-7f;
            rlhf_model *back = open_model(ctx, test_path("saved"));
            CHECK_EQ_S(hash_of(back), hash_of(half));
            rlhf_model_close(back);
            rlhf_model_close(half);
            rlhf_model_close(exact);
            rlhf_model_close(full);
            rlhf_close(ctx);
        }
    CHECK(half_value(0x7bff) == 65504.0f && half_value(1) == 0x1p-24f);
    for (int h = 0; h < 0x7c00; h++) { /* every finite half */
        CHECK(to_half(half_value((uint16_t)h)) == h);
        CHECK(v_ieee1((uint16_t)h) == half_value((uint16_t)h));
        CHECK(v_ieee1((uint16_t)(h | 0x8000)) == -half_value((uint16_t)h));
    }
    CHECK(isinf(v_ieee1(0x7c00)) && isnan(v_ieee1(0x7c01)));
}

/* Every tensor of the file that was read is, byte for byte, in the file that is written. */
TEST(tensors_are_written_as_they_were_read) {
    static const char *const more[] = {"test/golden/gpt_neox", "test/golden/gemma3_text"};
    for (size_t i = 0; i < 5; i++) {
        const char *dir = i < 3 ? golden[i] : more[i - 3];
        rlhf_ctx *ctx = test_context("auto", 1);
        rlhf_model *m = open_model(ctx, dir);
        OK(ctx, rlhf_model_save(m, NULL, test_path("out")));
        char from[1024], to[1024];
        snprintf(from, sizeof from, "%s/model.safetensors", dir);
        snprintf(to, sizeof to, "%s/out/model.safetensors", test_dir());
        same_tensors(from, to);
        rlhf_model_close(m);
        rlhf_close(ctx);
    }
}

/* The weights of golden[0] in `parts` files, tensor by tensor in turn, with their index; tensor
 * number `twice` is in the file behind its own, too. */
typedef struct shards {
    rlhf_model *m;
    const char *dir;
    int parts, twice;
} shards;

static void shards_run(rlhf_ctx *ctx, void *arg) {
    const shards *s = arg;
    ckpt_tensor list[4][64];
    int n[4] = {0}, count = 0;
    json_t *map = json_object();
    for (const model_tensor *t = s->m->family->tensors; t->name; t++)
        for (int l = 0; l < model_param_layers(s->m, t->param); l++, count++) {
            int part = count % s->parts;
            char file[64];
            snprintf(file, sizeof file, "part-%d.safetensors", s->parts - part);
            ckpt_tensor x = ckpt_tensor_of(s->m, t, l, 1);
            x.kind = '4';
            list[part][n[part]++] = x;
            if (count == s->twice) list[(part + 1) % s->parts][n[(part + 1) % s->parts]++] = x;
            json_object_set_new(map, x.name, json_string(file));
        }
    for (int i = 0; i < s->parts; i++) {
        char file[64];
        snprintf(file, sizeof file, "part-%d.safetensors", s->parts - i);
        ckpt_write(ctx, ckpt_path(ctx, s->dir, file), list[i], n[i]);
    }
    json_t *index = json_pack("{s:{s:i},s:o}", "metadata", "total_size", 0, "weight_map", map);
    json_write_file(ctx, ckpt_path(ctx, s->dir, "model.safetensors.index.json"), index);
    json_decref(index);
}

/* Replaces a word of the index. */
static void shards_edit(const char *dir, const char *from, const char *to) {
    char path[1100];
    size_t len;
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", dir);
    char *text = slurp(path, &len), *at = text ? strstr(text, from) : NULL;
    CHECK(at != NULL);
    FILE *f = at ? fopen(path, "wb") : NULL;
    if (f) {
        fprintf(f, "%.*s%s%.*s", (int)(at - text), text, to,
                (int)(len - (size_t)(at - text) - strlen(from)), at + strlen(from));
        fclose(f);
    }
    free(text);
}

static void shards_refuse(rlhf_ctx *ctx, const char *dir, rlhf_status want, const char *a,
                          const char *b) {
    rlhf_model *m;
    CHECK_EQ_I(rlhf_model_open(ctx, dir, &m), want);
    if (!strstr(rlhf_error(ctx), a) || !strstr(rlhf_error(ctx), b))
        test_fail(__FILE__, __LINE__, "\"%s\" lacks \"%s\" or \"%s\"", rlhf_error(ctx), a, b);
}

/* Weights in several files give the model of one file; what is wrong with them is named. */
TEST(weights_in_several_files) {
    rlhf_ctx *ctx = test_context("auto", 1);
    char dir[1024], path[1100];
    snprintf(dir, sizeof dir, "%s/shards", test_dir());
    snprintf(path, sizeof path, "%s/config.json", dir);
    mkdir(dir, 0777);
    copy_file("test/golden/gpt2/config.json", path);
    shards s = {open_model(ctx, golden[0]), dir, 3, -1};
    OK(ctx, test_call(ctx, shards_run, &s));
    rlhf_model *m = open_model(ctx, dir);
    CHECK_EQ_S(hash_of(m), hash_of(s.m));
    rlhf_model_close(m);
    /* The map says another file than the one that has it; no file has it; a file is not there. */
    shards_edit(dir, "part-3", "part-2");
    shards_refuse(ctx, dir, RLHF_ERR_FORMAT, "transformer.wte.weight", "part-2");
    OK(ctx, test_call(ctx, shards_run, &s));
    shards_edit(dir, "transformer.wte.weight", "transformer.wtf.weight");
    shards_refuse(ctx, dir, RLHF_ERR_FORMAT, "index.json", "wtf.weight\" is in no file");
    OK(ctx, test_call(ctx, shards_run, &s));
    shards_edit(dir, "part-1", "part-9");
    shards_refuse(ctx, dir, RLHF_ERR_IO, "part-9.safetensors", "transformer.h.0.ln_1.weight");
    OK(ctx, test_call(ctx, shards_run, &s));
    shards_edit(dir, "\"part-3.safetensors\"", "3");
    shards_refuse(ctx, dir, RLHF_ERR_FORMAT, "weight_map.transformer.wte.weight", "found 3");
    s.twice = 4;
    OK(ctx, test_call(ctx, shards_run, &s));
    shards_refuse(ctx, dir, RLHF_ERR_FORMAT, "transformer.h.0.ln_1.bias\" is in part-", "too");
    /* A file of the map that lacks a tensor of the model. */
    s.twice = -1;
    s.m->family = &(model_family){s.m->family->type, "", "", "transformer.", 1,
                                  s.m->family->tensors + 1, NULL};
    OK(ctx, test_call(ctx, shards_run, &s));
    shards_refuse(ctx, dir, RLHF_ERR_FORMAT, "index.json", "wte.weight\" is missing");
    rlhf_model_close(s.m);
    rlhf_close(ctx);
}

TEST(initial_weights_follow_the_seed) {
    rlhf_ctx *ctx = test_context("auto", 1);
    char hash[3][17];
    for (int i = 0; i < 3; i++) {
        rlhf_model *m = NULL;
        OK(ctx, rlhf_model_init(ctx, "test/golden/gpt2/config.json", 120, 4, 5,
                                i == 2 ? 8 : 7, &m));
        CHECK_EQ_I(rlhf_model_get_shape(m).vocab_size, 120);
        snprintf(hash[i], sizeof hash[i], "%s", hash_of(m));
        if (!i) OK(ctx, rlhf_model_save(m, NULL, test_path("new")));
        if (!i) {
            rlhf_model *back = open_model(ctx, test_path("new"));
            CHECK(back && back->bos == 4 && back->n_eos == 1 && back->eos[0] == 5);
            rlhf_model_close(back);
        }
        rlhf_model_close(m);
    }
    CHECK_EQ_S(hash[0], hash[1]);
    CHECK(strcmp(hash[0], hash[2]) != 0);
    rlhf_close(ctx);
}

/* ---- generation ------------------------------------------------------------------------------ */

static void same_sample(int line, const rlhf_sample *a, const rlhf_sample *b) {
    test_eq_s(__FILE__, line, "sample", "expected", a->completion, b->completion);
    test_eq_i(__FILE__, line, "tokens", "expected", a->n_completion, b->n_completion);
    if (a->n_completion == b->n_completion &&
        memcmp(a->completion_ids, b->completion_ids,
               (size_t)a->n_completion * sizeof *a->completion_ids))
        test_fail(__FILE__, line, "other tokens");
    if (memcmp(&a->logprob, &b->logprob, sizeof a->logprob))
        test_fail(__FILE__, line, "logprob %.17g, expected %.17g", a->logprob, b->logprob);
    test_eq_i(__FILE__, line, "finished", "expected", a->finished, b->finished);
}

/* A sample is a function of the weights, its prompt, its index and the seed: not of the batch, nor
 * of the other prompts. */
TEST(samples_do_not_depend_on_their_company) {
    for (int k = 0; k < 2; k++) {
        rlhf_ctx *ctx = test_context("auto", 1);
        rlhf_tokenizer *tok = small_tok(ctx);
        rlhf_model *m = open_model(ctx, golden[k]);
        rlhf_generate_config c = rlhf_generate_config_default();
        c.max_new_tokens = 20;
        c.num_return_sequences = 3;
        const char *one[4] = {"hello there", "a", "the quick brown fox", "zz"};
        const char *two[4] = {"hello there", "something else altogether", "the quick brown fox",
                              "b"};
        rlhf_sample *a = NULL, *b = NULL;
        int n = 0, count = 0;
        OK(ctx, rlhf_generate(m, tok, &c, one, 4, &a, &n));
        CHECK_EQ_I(n, 12);
        int differ = 0;
        for (int i = 0; i < n; i++) {
            CHECK_EQ_I(a[i].prompt_index, i / 3);
            CHECK_EQ_I(a[i].sample_index, i % 3);
            CHECK_EQ_S(a[i].prompt, one[i / 3]);
            CHECK(!a[i].record);
            CHECK(a[i].n_completion >= 1 && a[i].n_completion <= 20);
            CHECK(a[i].finished == (a[i].completion_ids[a[i].n_completion - 1] == 2));
            CHECK(a[i].finished || a[i].n_completion == 20);
            if (i % 3) differ += strcmp(a[i].completion, a[i - 1].completion) != 0;
        }
        CHECK(differ == 8);
        for (int batch = 1; batch <= 32; batch *= 2) {
            c.batch_size = batch + (batch == 4);
            OK(ctx, rlhf_generate(m, tok, &c, one, 4, &b, &count));
            for (int i = 0; i < count && i < n; i++) same_sample(__LINE__, b + i, a + i);
            rlhf_samples_free(ctx, b, count);
        }
        OK(ctx, rlhf_generate(m, tok, &c, two, 4, &b, &count));
        for (int i = 0; i < 3; i++) {
            same_sample(__LINE__, b + i, a + i);
            same_sample(__LINE__, b + 6 + i, a + 6 + i);
        }
        rlhf_samples_free(ctx, b, count);
        OK(ctx, rlhf_generate(m, tok, &c, one, 1, &b, &count));
        for (int i = 0; i < 3; i++) same_sample(__LINE__, b + i, a + i);
        rlhf_samples_free(ctx, b, count);
        c.seed++;
        OK(ctx, rlhf_generate(m, tok, &c, one, 1, &b, &count));
        CHECK(strcmp(b[0].completion, a[0].completion) != 0);
        rlhf_samples_free(ctx, b, count);
        rlhf_samples_free(ctx, a, n);
        rlhf_model_close(m);
        rlhf_tokenizer_close(tok);
        rlhf_close(ctx);
    }
}

/* At temperature 1 the log-probability is the sum of rlhf_model_logprobs over the completion. */
TEST(logprob_of_a_sample) {
    for (size_t k = 0; k < sizeof golden / sizeof *golden; k++) {
        rlhf_ctx *ctx = test_context("auto", 1);
        rlhf_tokenizer *tok = small_tok(ctx);
        rlhf_model *m = open_model(ctx, golden[k]);
        rlhf_generate_config c = rlhf_generate_config_default();
        rlhf_sample *s = NULL;
        const char *prompts[3] = {"hello", "x", "some longer prompt"};
        int n = 0;
        c.max_new_tokens = 30;
        c.num_return_sequences = 2;
        OK(ctx, rlhf_generate(m, tok, &c, prompts, 3, &s, &n));
        for (int i = 0; i < n; i++) {
            float logp[64];
            int from = s[i].n_prompt, total = from + s[i].n_completion;
            OK(ctx, rlhf_model_logprobs(m, s[i].prompt_ids, total, logp));
            double sum = 0;
            for (int t = from - 1; t < total - 1; t++) sum += (double)logp[t];
            if (sum != s[i].logprob)
                test_fail(__FILE__, __LINE__, "%.17g, expected %.17g", s[i].logprob, sum);
        }
        rlhf_samples_free(ctx, s, n);
        rlhf_model_close(m);
        rlhf_tokenizer_close(tok);
        rlhf_close(ctx);
    }
}

/* Greedy is the most likely token at each step, and so is top_k 1; a generation ends where the
 * positions do. */
TEST(greedy_is_argmax) {
    for (size_t k = 0; k < sizeof golden / sizeof *golden; k++) {
        rlhf_ctx *ctx = test_context("auto", 1);
        rlhf_tokenizer *tok = small_tok(ctx);
        rlhf_model *m = open_model(ctx, golden[k]);
        rlhf_generate_config c = rlhf_generate_config_default();
        const char *prompts[2] = {"hello", "what is it"};
        rlhf_sample *s = NULL, *top = NULL;
        int n = 0, n_top = 0;
        c.max_new_tokens = 100;
        c.temperature = 0;
        OK(ctx, rlhf_generate(m, tok, &c, prompts, 2, &s, &n));
        c.temperature = 0.7;
        c.top_k = 1;
        OK(ctx, rlhf_generate(m, tok, &c, prompts, 2, &top, &n_top));
        for (int i = 0; i < n; i++) {
            static float logits[64 * 97];
            int from = s[i].n_prompt, total = from + s[i].n_completion;
            CHECK(s[i].finished || total == 64);
            OK(ctx, rlhf_model_logits(m, s[i].prompt_ids, total, logits));
            for (int t = from; t < total; t++) {
                const float *x = logits + (t - 1) * 97;
                int best = 0;
                for (int v = 1; v < 97; v++)
                    if (x[v] > x[best]) best = v;
                CHECK_EQ_I(s[i].prompt_ids[t], best);
            }
            CHECK_EQ_S(top[i].completion, s[i].completion);
            CHECK_NEAR(top[i].logprob, 0, 1e-5);
        }
        rlhf_samples_free(ctx, top, n_top);
        rlhf_samples_free(ctx, s, n);
        rlhf_model_close(m);
        rlhf_tokenizer_close(tok);
        rlhf_close(ctx);
    }
}

/* top_k and top_p only draw from what they keep. */
TEST(truncated_sampling) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = small_tok(ctx);
    rlhf_model *m = open_model(ctx, golden[0]);
    rlhf_generate_config c = rlhf_generate_config_default();
    const char *prompts[1] = {"hello"};
    c.max_new_tokens = 1;
    c.num_return_sequences = 300;
    float logits[5 * 97];
    int32_t ids[8];
    int n_ids = 0;
    OK(ctx, rlhf_encode(tok, "hello", 5, 1, ids, 8, &n_ids));
    REQUIRE(n_ids == 5);
    OK(ctx, rlhf_model_logits(m, ids, 5, logits));
    const float *x = logits + 4 * 97;
    for (int mode = 0; mode < 2; mode++) {
        c.top_k = mode ? 0 : 5;
        c.top_p = mode ? 0.2 : 1;
        rlhf_sample *s = NULL;
        int n = 0, seen[97] = {0}, kinds = 0;
        OK(ctx, rlhf_generate(m, tok, &c, prompts, 1, &s, &n));
        double total = 0;
        for (int v = 0; v < 97; v++) total += exp((double)x[v]);
        for (int i = 0; i < n; i++) {
            int id = s[i].completion_ids[0], above = 0;
            double mass = 0;
            for (int v = 0; v < 97; v++)
                if (x[v] > x[id]) above++, mass += exp((double)x[v]) / total;
            if (mode) CHECK(mass < 0.2);
            else CHECK(above < 5);
            kinds += !seen[id]++;
        }
        if (!mode) CHECK_EQ_I(kinds, 5);
        CHECK(kinds > 1);
        rlhf_samples_free(ctx, s, n);
    }
    rlhf_model_close(m);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

TEST(generate_for_a_dataset) {
    rlhf_ctx *ctx = test_context("auto", 1);
    bench b = bench_open(ctx, golden[0]);
    rlhf_generate_config c = rlhf_generate_config_default();
    rlhf_sample *s = NULL, *t = NULL;
    int n = 0, count = 0;
    c.max_new_tokens = 9;
    const char *prompts[3] = {"a b", "hello", "c"};
    OK(ctx, rlhf_generate_dataset(b.model, b.tok, &c, b.prompts, &s, &n));
    OK(ctx, rlhf_generate(b.model, b.tok, &c, prompts, 3, &t, &count));
    CHECK_EQ_I(n, 3);
    for (int i = 0; i < 3 && i < n; i++) {
        same_sample(__LINE__, s + i, t + i);
        CHECK_EQ_S(s[i].record, rlhf_dataset_record(b.prompts, i));
        CHECK_EQ_S(s[i].prompt, prompts[i]);
    }
    rlhf_samples_free(ctx, s, n);
    rlhf_samples_free(ctx, t, count);
    bench_close(&b);
    rlhf_close(ctx);
}

/* A model may have more rows than the tokenizer has entries: they stand for no text. */
TEST(padded_vocabulary) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = small_tok(ctx);
    rlhf_model *m = NULL;
    OK(ctx, rlhf_model_init(ctx, "test/golden/gpt2/config.json", 400, 1, 2, 3, &m));
    rlhf_generate_config c = rlhf_generate_config_default();
    const char *prompts[1] = {"hello"};
    rlhf_sample *s = NULL;
    int n = 0;
    OK(ctx, rlhf_generate(m, tok, &c, prompts, 1, &s, &n));
    if (n) CHECK(s[0].n_completion > (int)strlen(s[0].completion));
    rlhf_samples_free(ctx, s, n);
    rlhf_model_close(m);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

/* Transformers pools at the last token that is not padding: the end token of a scorer is none. */
TEST(an_end_is_not_padding) {
    static const struct { int bos, eos; const char *config; json_int_t want; } cases[] = {
        {1, 2, "{}", 1}, {2, 2, "{}", -1}, {-1, 2, "{\"pad_token_id\": 2}", -1},
        {1, 2, "{\"pad_token_id\": 2}", 1}, {1, 2, "{\"pad_token_id\": 9}", 9}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rlhf_model m = {.bos = cases[i].bos, .eos = {(int32_t)cases[i].eos}, .n_eos = 1};
        json_t *config = json_loads(cases[i].config, 0, NULL);
        ckpt_set_pad(&m, config);
        const json_t *pad = json_object_get(config, "pad_token_id");
        CHECK_EQ_I(json_is_integer(pad) ? json_integer_value(pad) : -1, cases[i].want);
        json_decref(config);
    }
}

TEST_MAIN(CASE(an_end_is_not_padding), CASE(default_memory), CASE(oom_context), CASE(oom_tokenizer),
          CASE(oom_encode), CASE(oom_dataset),
          CASE(oom_model), CASE(oom_generate_and_eval), CASE(oom_sft), CASE(oom_rm), CASE(oom_ppo),
          CASE(oom_run_sft), CASE(oom_run_rm), CASE(statuses_have_texts),
          CASE(options_are_checked), CASE(null_arguments), CASE(bad_arguments_have_texts),
          CASE(trainers_refuse), CASE(configurations_are_consistent),
          CASE(contexts_on_threads_are_independent), CASE(contexts_take_turns),
          CASE(stop_and_resume_sft), CASE(stop_and_resume_rm), CASE(stop_and_resume_ppo),
          CASE(resuming_a_finished_run_changes_nothing), CASE(progress_stops_generation),
          CASE(reward_function_calls_the_library), CASE(log_hook),
          CASE(close_gives_everything_back), CASE(save_and_open_gives_the_same_bits),
          CASE(scorers_there_and_back), CASE(clones_share_nothing),
          CASE(half_precision_is_read_exactly), CASE(tensors_are_written_as_they_were_read),
          CASE(weights_in_several_files),
          CASE(initial_weights_follow_the_seed), CASE(samples_do_not_depend_on_their_company),
          CASE(logprob_of_a_sample), CASE(greedy_is_argmax), CASE(truncated_sampling),
          CASE(generate_for_a_dataset), CASE(padded_vocabulary))
