/* Real models and data (../shared/assets, or RLHF_TEST_ASSETS; skipped where they are absent):
 * reference logits and greedy texts, then the three stages on a small model of children's stories.
 */

#include "../rlhf.c"
#include "test.h"

/* ---- helpers --------------------------------------------------------------------------------- */

#define NEED_ASSET(name)                                                                           \
    do {                                                                                           \
        if (!test_asset(name)) SKIP("no shared assets here");                                      \
    } while (0)

static json_t *golden_of(const char *model) {
    char path[256];
    json_error_t e;
    snprintf(path, sizeof path, "models/%s/golden.json", model);
    json_t *j = json_load_file(test_asset(path), 0, &e);
    if (!j) test_fail(__FILE__, __LINE__, "%s: %s", path, e.text);
    return j;
}

static rlhf_model *open_model(rlhf_ctx *ctx, const char *model) {
    char path[256];
    rlhf_model *m = NULL;
    snprintf(path, sizeof path, "models/%s", model);
    OK(ctx, rlhf_model_open(ctx, test_asset(path), &m));
    return m;
}

static int read_ids(const json_t *list, int32_t *ids, int cap) {
    int n = (int)json_array_size(list);
    for (int i = 0; i < n && i < cap; i++)
        ids[i] = (int32_t)json_integer_value(json_array_get(list, (size_t)i));
    return n < cap ? n : cap;
}

/* Rows of logits against the reference, from its flat list. */
static void check_logits(int line, const float *x, const json_t *list, size_t at, size_t n) {
    double worst = 0;
    for (size_t i = 0; i < n; i++)
        worst = fmax(worst,
                     fabs((double)x[i] - json_number_value(json_array_get(list, at + i))));
    if (!(worst <= 1e-4)) test_fail(__FILE__, line, "logits are off by %.3g", worst);
}

/* ---- reference values ------------------------------------------------------------------------ */

/* A story model: ids of the prompt, its likelihood, the logits behind it, the greedy text. */
static void story_model(const char *name) {
    rlhf_ctx *ctx = test_context("auto", 0);
    json_t *g = golden_of(name);
    rlhf_model *m = open_model(ctx, name);
    char path[256];
    snprintf(path, sizeof path, "models/%s", name);
    rlhf_tokenizer *tok = NULL;
    OK(ctx, rlhf_tokenizer_open(ctx, test_asset(path), &tok));
    REQUIRE(g && m && tok);
    const char *prompt = json_string_value(json_object_get(g, "prompt"));
    int vocab = rlhf_model_get_shape(m).vocab_size;
    int32_t want[512], ids[512];
    int n_want = read_ids(json_object_get(g, "prompt_ids"), want, 512), n = 0;
    OK(ctx, rlhf_encode(tok, prompt, strlen(prompt), 1, ids, 512, &n));
    CHECK_EQ_I(n, n_want);
    CHECK(memcmp(ids, want, (size_t)n_want * sizeof *ids) == 0);
    float *x = malloc((size_t)n * (size_t)vocab * sizeof *x), logp[64];
    OK(ctx, rlhf_model_logits(m, want, n_want, x));
    const json_t *after = json_object_get(g, "logits_after_prompt");
    CHECK_EQ_I(json_array_size(after), vocab);
    check_logits(__LINE__, x + (size_t)(n - 1) * (size_t)vocab, after, 0, (size_t)vocab);
    OK(ctx, rlhf_model_logprobs(m, want, n_want, logp));
    double nll = 0;
    for (int t = 0; t + 1 < n; t++) nll -= (double)logp[t];
    CHECK_NEAR(nll, json_number_value(json_object_get(g, "prompt_sum_nll_excluding_bos")), 1e-4);

    rlhf_generate_config c = rlhf_generate_config_default();
    rlhf_sample *s = NULL;
    int count = 0, n_greedy = read_ids(json_object_get(g, "greedy_ids"), want, 512);
    c.temperature = 0;
    c.max_new_tokens = n_greedy - n;
    OK(ctx, rlhf_generate(m, tok, &c, &prompt, 1, &s, &count));
    REQUIRE(s != NULL);
    CHECK_EQ_I(s->n_prompt + s->n_completion, n_greedy);
    CHECK(memcmp(s->prompt_ids, want, (size_t)n_greedy * sizeof *want) == 0);
    char *text = NULL;
    OK(ctx, rlhf_decode(tok, s->prompt_ids, n_greedy, 1, &text, NULL));
    CHECK_EQ_S(text, json_string_value(json_object_get(g, "greedy_text")));
    rlhf_free(ctx, text);
    rlhf_samples_free(ctx, s, count);
    free(x);
    json_decref(g);
    rlhf_model_close(m);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

TEST(babyllama361) {
    NEED_ASSET("models/babyllama361/golden.json");
    story_model("babyllama361");
}

TEST(stories260K) {
    NEED_ASSET("models/stories260K/golden.json");
    story_model("stories260K");
}

TEST(gpt_nano_sort) {
    NEED_ASSET("models/gpt-nano-sort/golden.json");
    rlhf_ctx *ctx = test_context("auto", 0);
    json_t *g = golden_of("gpt-nano-sort");
    rlhf_model *m = open_model(ctx, "gpt-nano-sort");
    const json_t *rows = json_object_get(g, "input_ids");
    REQUIRE(m && json_array_size(rows) == 3);
    for (size_t r = 0; r < 3; r++) {
        int32_t ids[16];
        float x[16 * 3];
        int n = read_ids(json_array_get(rows, r), ids, 16);
        CHECK_EQ_I(n, 11);
        OK(ctx, rlhf_model_logits(m, ids, n, x));
        check_logits(__LINE__, x, json_object_get(g, "logits"), r * 33, 33);
    }
    /* It sorts: six digits, then each next one is the most likely. */
    for (int trial = 0; trial < 20; trial++) {
        int32_t ids[16];
        int count[3] = {0}, wrong = 0;
        for (int i = 0; i < 6; i++) count[ids[i] = (int32_t)test_int(0, 2)]++;
        for (int i = 6; i < 12; i++) {
            float x[16 * 3];
            OK(ctx, rlhf_model_logits(m, ids, i < 11 ? i : 11, x));
            const float *last = x + (size_t)((i < 11 ? i : 11) - 1) * 3;
            int best = last[1] > last[0] ? 1 : 0;
            if (last[2] > last[best]) best = 2;
            ids[i] = best;
            int at = i - 6, sorted = at < count[0] ? 0 : at < count[0] + count[1] ? 1 : 2;
            wrong += best != sorted;
        }
        CHECK_EQ_I(wrong, 0);
    }
    json_decref(g);
    rlhf_model_close(m);
    rlhf_close(ctx);
}

TEST(llama_fixture_ferric) {
    NEED_ASSET("models/llama-fixture-ferric/golden.json");
    rlhf_ctx *ctx = test_context("auto", 0);
    json_t *g = golden_of("llama-fixture-ferric");
    rlhf_model *m = open_model(ctx, "llama-fixture-ferric");
    int32_t ids[16];
    float x[16 * 32];
    REQUIRE(g && m);
    int n = read_ids(json_object_get(g, "ids"), ids, 16);
    CHECK_EQ_I(n, 5);
    OK(ctx, rlhf_model_logits(m, ids, n, x));
    check_logits(__LINE__, x, json_object_get(g, "logits"), 0, (size_t)n * 32);
    json_decref(g);
    rlhf_model_close(m);
    rlhf_close(ctx);
}

/* ---- stories --------------------------------------------------------------------------------- */

/* The whole text of the stories, with spaces for line ends and without stories' ends ('\1'). */
static char *stories(void) {
    gzFile gz = gzopen(test_asset("datasets/tinystories_2MB.txt.gz"), "rb");
    if (!gz) return NULL;
    size_t cap = (size_t)4 << 20, n = 0;
    char *text = malloc(cap);
    for (int got; n + 1 < cap && (got = gzread(gz, text + n, (unsigned)(cap - n - 1))) > 0;)
        n += (size_t)got;
    gzclose(gz);
    text[n] = 0;
    size_t k = 0;
    for (size_t i = 0; i < n; i++) {
        if (strncmp(text + i, "<|endoftext|>", 13) == 0) {
            text[k++] = '\1';
            i += 12;
        } else if (text[i] == '\n' || text[i] == ' ') {
            if (k && text[k - 1] != ' ' && text[k - 1] != '\1') text[k++] = ' ';
        } else text[k++] = text[i];
    }
    text[k] = 0;
    return text;
}

/* The next sentence behind *at, as [start, *at); 0 when there are no more. */
static size_t next_sentence(const char *text, size_t *at, const char **start) {
    size_t i = *at;
    while (text[i] == ' ' || text[i] == '\1') i++;
    *start = text + i;
    while (text[i] && text[i] != '\1' && !strchr(".!?", text[i])) i++;
    while (text[i] && strchr(".!?\"", text[i])) i++;
    size_t n = (size_t)(text + i - *start);
    *at = i;
    return n;
}

/* Plain characters that the 361 tokens know and JSON needs no escape for. */
static bool is_plain(const char *s, size_t n) {
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)s[i] < ' ' || (unsigned char)s[i] > '~' || s[i] == '"' || s[i] == '\\')
            return false;
    return true;
}

/* Where one of the planted words begins, or -1. */
static int animal_at(const char *s, size_t n) {
    static const char *const words[] = {"bird", "dog", "cat"};
    for (size_t i = 0; i < n; i++)
        for (int w = 0; w < 3; w++) {
            size_t len = strlen(words[w]);
            if (i + len <= n && !strncmp(s + i, words[w], len) &&
                (!i || !((s[i - 1] | 32) >= 'a' && (s[i - 1] | 32) <= 'z')) &&
                (i + len == n || !((s[i + len] | 32) >= 'a' && (s[i + len] | 32) <= 'z')))
                return (int)i;
        }
    return -1;
}

/* A text that grows. */
typedef struct text_buf {
    char *p;
    size_t n, cap;
} text_buf;

__attribute__((format(printf, 2, 3))) static void put(text_buf *b, const char *format, ...) {
    va_list args;
    if (b->cap - b->n < 2048) b->p = realloc(b->p, b->cap = 2 * b->cap + 4096);
    va_start(args, format);
    b->n += (size_t)vsnprintf(b->p + b->n, b->cap - b->n, format, args);
    va_end(args);
}

static rlhf_dataset *parse(rlhf_ctx *ctx, rlhf_tokenizer *tok, rlhf_data_kind kind, int max_length,
                           int add_eos, text_buf *b) {
    rlhf_data_config c = rlhf_data_config_default(kind);
    rlhf_dataset *d = NULL;
    c.max_length = max_length;
    c.add_eos = add_eos;
    OK(ctx, rlhf_dataset_parse(ctx, b->p, b->n, "stories", tok, &c, &d));
    free(b->p);
    *b = (text_buf){0};
    return d;
}

static double eval_number(rlhf_ctx *ctx, rlhf_model *m, rlhf_dataset *d, const char *key) {
    char *text = NULL;
    OK(ctx, rlhf_eval(m, d, NULL, &text));
    json_t *j = text ? json_loads(text, 0, NULL) : NULL;
    double x = json_number_value(json_object_get(j, key));
    json_decref(j);
    rlhf_free(ctx, text);
    return x;
}

/* Pieces of up to 220 characters that end with a sentence. */
static void put_pieces(text_buf *b, const char *text, size_t *at, int n) {
    char piece[256] = "";
    size_t len = 0;
    for (int made = 0; made < n && text[*at];) {
        const char *s;
        size_t before = *at, k = next_sentence(text, at, &s);
        if (!k) break;
        bool fits = k <= 218 && is_plain(s, k);
        if (len && (!fits || len + 1 + k > 218)) {
            put(b, "{\"text\":\"%s\"}\n", piece);
            len = 0;
            made++;
            if (fits) *at = before; /* it begins the next piece */
            continue;
        }
        if (!fits) continue;
        len += (size_t)snprintf(piece + len, sizeof piece - len, "%s%.*s", len ? " " : "", (int)k,
                                s);
    }
}

/* Pieces that perplexity is measured on. */
static int held_out(void) { return test_quick() ? 3 : 40; }

TEST(sft_lowers_perplexity) {
    NEED_ASSET("datasets/tinystories_2MB.txt.gz");
    rlhf_ctx *ctx = test_context("auto", 0);
    rlhf_tokenizer *tok = NULL;
    rlhf_model *m = open_model(ctx, "babyllama361");
    OK(ctx, rlhf_tokenizer_open(ctx, test_asset("models/babyllama361"), &tok));
    char *text = stories();
    REQUIRE(m && tok && text);
    size_t at = 0, later = 1500000;
    int steps = test_quick() ? 3 : 48;
    text_buf b = {0};
    put_pieces(&b, text, &at, 8 * steps);
    rlhf_dataset *train = parse(ctx, tok, RLHF_DATA_SFT, 256, 1, &b);
    put_pieces(&b, text, &later, held_out());
    text_buf copy = {malloc(b.n), b.n, b.n};
    memcpy(copy.p, b.p, b.n);
    rlhf_dataset *held = parse(ctx, tok, RLHF_DATA_SFT, 256, 1, &b);
    rlhf_dataset *plain = parse(ctx, tok, RLHF_DATA_SFT, 256, 0, &copy); /* without the end */
    CHECK_EQ_I(rlhf_dataset_count(train), 8 * steps);
    CHECK_EQ_I(rlhf_dataset_dropped(train), 0);
    double before = eval_number(ctx, m, held, "perplexity");
    double plain_before = eval_number(ctx, m, plain, "perplexity");
    rlhf_sft_config c = rlhf_sft_config_default();
    rlhf_trainer *t = NULL;
    c.learning_rate = 3e-5;
    c.warmup_steps = 4;
    c.num_train_epochs = 1;
    OK(ctx, rlhf_sft_open(m, tok, train, NULL, &c, &t));
    CHECK_EQ_I(rlhf_trainer_steps_total(t), steps);
    OK(ctx, rlhf_trainer_run(t));
    double after = eval_number(ctx, m, held, "perplexity");
    double plain_after = eval_number(ctx, m, plain, "perplexity");
    printf(" held-out perplexity %.4f -> %.4f, without the end token %.4f -> %.4f ", before, after,
           plain_before, plain_after);
    CHECK(test_quick() || (after < 0.95 * before && plain_after < 0.97 * plain_before));
    rlhf_dataset_close(plain);
    rlhf_trainer_close(t);
    rlhf_dataset_close(train);
    rlhf_dataset_close(held);
    rlhf_tokenizer_close(tok);
    rlhf_model_close(m);
    free(text);
    rlhf_close(ctx);
}

/* Held-out perplexity after a short run with one seed, its order being what differs. */
static double short_run(const char *dtype, int seed, const char *text, int steps) {
    rlhf_options o = rlhf_options_default();
    rlhf_ctx *ctx = NULL;
    rlhf_tokenizer *tok = NULL;
    rlhf_trainer *t = NULL;
    size_t at = 0, later = 1500000;
    text_buf b = {0};
    o.dtype = dtype;
    o.hooks = test_hooks();
    o.hooks.log = NULL;
    CHECK(rlhf_open(&ctx, &o) == RLHF_OK);
    rlhf_model *m = open_model(ctx, "babyllama361");
    OK(ctx, rlhf_tokenizer_open(ctx, test_asset("models/babyllama361"), &tok));
    put_pieces(&b, text, &at, 16 * steps); /* half of them, by the seed's order */
    rlhf_dataset *train = parse(ctx, tok, RLHF_DATA_SFT, 256, 1, &b);
    put_pieces(&b, text, &later, held_out());
    rlhf_dataset *held = parse(ctx, tok, RLHF_DATA_SFT, 256, 1, &b);
    rlhf_sft_config c = rlhf_sft_config_default();
    c.learning_rate = 3e-5;
    c.warmup_steps = 4;
    c.max_steps = steps;
    c.seed = seed;
    OK(ctx, rlhf_sft_open(m, tok, train, NULL, &c, &t));
    OK(ctx, rlhf_trainer_run(t));
    double after = eval_number(ctx, m, held, "perplexity");
    rlhf_trainer_close(t);
    rlhf_dataset_close(train);
    rlhf_dataset_close(held);
    rlhf_tokenizer_close(tok);
    rlhf_model_close(m);
    rlhf_close(ctx);
    return after;
}

/* What bfloat16 costs is less than what the seed decides. */
TEST(bfloat16_within_the_spread_of_seeds) {
    NEED_ASSET("datasets/tinystories_2MB.txt.gz");
    char *text = stories();
    int steps = test_quick() ? 2 : 16;
    double low = INFINITY, high = 0, half = short_run("bf16", 1, text, steps);
    for (int seed = 1; seed <= (test_quick() ? 1 : 5); seed++) {
        double p = short_run("f32", seed, text, steps);
        low = fmin(low, p);
        high = fmax(high, p);
    }
    printf(" perplexity with bf16 %.4f, with f32 %.4f to %.4f ", half, low, high);
    CHECK(test_quick() ? fabs(half - low) < 0.01 * low : low <= half && half <= high);
    free(text);
}

/* ---- a planted preference -------------------------------------------------------------------- */

static const char *const openings[] = {"One day,", "Once upon a time,", "One day, a",
                                       "Once upon a time, there was a"};
enum { OPENINGS = sizeof openings / sizeof *openings, EACH = 720, ANSWER = 40 };

/* Answers of the model itself: those with one of the planted words in their first 36 characters,
 * and those without any. */
typedef struct planted {
    rlhf_sample *all, *with[1024], *without[1024];
    int n, n_with, n_without;
} planted;

static void find_answers(rlhf_ctx *ctx, rlhf_model *m, rlhf_tokenizer *tok, planted *p) {
    rlhf_generate_config c = rlhf_generate_config_default();
    c.num_return_sequences = EACH;
    c.batch_size = 64;
    c.max_new_tokens = ANSWER;
    *p = (planted){0};
    OK(ctx, rlhf_generate(m, tok, &c, openings, OPENINGS, &p->all, &p->n));
    for (int i = 0; i < p->n; i++) { /* the openings by turns */
        rlhf_sample *s = p->all + (i % OPENINGS * EACH + i / OPENINGS);
        size_t n = strlen(s->completion);
        int found = animal_at(s->completion, n);
        if (!is_plain(s->completion, n)) continue;
        if (found >= 0 && found < 36 && p->n_with < 1024) p->with[p->n_with++] = s;
        if (found < 0 && p->n_without < 1024) p->without[p->n_without++] = s;
    }
}

/* Pairs [from, to); flip: which answer is chosen is a coin. */
static rlhf_dataset *planted_pairs(rlhf_ctx *ctx, rlhf_tokenizer *tok, const planted *p, int from,
                                   int to, int flip) {
    text_buf b = {0};
    for (int i = from; i < to; i++) {
        int swap = flip && test_int(0, 1);
        put(&b, "{\"prompt\":\"%s\",\"%s\":\" %s\",", p->with[i]->prompt,
            swap ? "rejected" : "chosen", p->with[i]->completion);
        put(&b, "\"%s\":\" %s\"}\n", swap ? "chosen" : "rejected", p->without[i]->completion);
    }
    return parse(ctx, tok, RLHF_DATA_PREFERENCE, 256, 0, &b);
}

static rlhf_model *train_reward(rlhf_ctx *ctx, rlhf_model *lm, rlhf_tokenizer *tok,
                                rlhf_dataset *pairs, double epochs, double lr) {
    rlhf_model *m = NULL;
    rlhf_trainer *t = NULL;
    rlhf_rm_config c = rlhf_rm_config_default();
    c.learning_rate = lr;
    c.num_train_epochs = epochs;
    c.warmup_steps = 5;
    c.normalize_samples = 64;
    c.response_length = ANSWER;
    c.lr_scheduler_type = "cosine";
    OK(ctx, rlhf_model_clone(lm, RLHF_HEAD_SCORE, &m));
    OK(ctx, rlhf_rm_open(m, lm, tok, pairs, NULL, &c, &t));
    OK(ctx, rlhf_trainer_run(t));
    rlhf_trainer_close(t);
    return m;
}

/* Share of 128 sampled answers that mention a planted word. */
static double mentions(rlhf_ctx *ctx, rlhf_model *m, rlhf_tokenizer *tok) {
    rlhf_generate_config c = rlhf_generate_config_default();
    rlhf_sample *s = NULL;
    int n = 0, hits = 0;
    c.num_return_sequences = 128 / OPENINGS;
    c.batch_size = 64;
    c.max_new_tokens = ANSWER;
    c.seed = 7;
    OK(ctx, rlhf_generate(m, tok, &c, openings, OPENINGS, &s, &n));
    for (int i = 0; i < n; i++) hits += animal_at(s[i].completion, strlen(s[i].completion)) >= 0;
    rlhf_samples_free(ctx, s, n);
    return n ? (double)hits / n : NAN;
}

TEST(reward_model_and_ppo) {
    NEED_ASSET("models/babyllama361");
    if (test_quick()) SKIP("long");
    rlhf_ctx *ctx = test_context("auto", 0);
    rlhf_tokenizer *tok = NULL;
    rlhf_model *lm = open_model(ctx, "babyllama361");
    OK(ctx, rlhf_tokenizer_open(ctx, test_asset("models/babyllama361"), &tok));
    static planted p;
    REQUIRE(lm && tok);
    find_answers(ctx, lm, tok, &p);
    int pairs = p.n_with < p.n_without ? p.n_with : p.n_without;
    printf(" %d pairs,", pairs);
    REQUIRE(pairs >= 300);
    int train_to = pairs - 120;
    rlhf_dataset *held = planted_pairs(ctx, tok, &p, train_to, pairs, 0);
    rlhf_dataset *coins = planted_pairs(ctx, tok, &p, train_to, pairs, 1);
    rlhf_dataset *shuffled = planted_pairs(ctx, tok, &p, 0, train_to, 1);
    rlhf_dataset *train = planted_pairs(ctx, tok, &p, 0, train_to, 0);

    rlhf_model *rm = train_reward(ctx, lm, tok, train, 3, 4e-4);
    double accuracy = eval_number(ctx, rm, held, "accuracy");
    printf(" accuracy %.3f", accuracy);
    fflush(stdout);
    CHECK(accuracy > 0.95);
    rlhf_model *none = train_reward(ctx, lm, tok, shuffled, 1, 4e-4);
    double chance = eval_number(ctx, none, coins, "accuracy");
    printf(", of shuffled labels %.3f", chance);
    fflush(stdout);
    CHECK(chance >= 0.42 && chance <= 0.58);
    rlhf_model_close(none);

    double before = mentions(ctx, lm, tok);
    text_buf b = {0};
    for (int i = 0; i < OPENINGS; i++) put(&b, "{\"prompt\":\"%s\"}\n", openings[i]);
    rlhf_dataset *prompts = parse(ctx, tok, RLHF_DATA_PROMPT, 256, 1, &b);
    rlhf_ppo_config c = rlhf_ppo_config_default();
    rlhf_trainer *t = NULL;
    double first = NAN, last = 0, kl = 0, worst = 0;
    int updates = 16;
    c.max_steps = updates;
    c.batch_size = 48;
    c.response_length = ANSWER;
    c.temperature = 1;
    c.num_ppo_epochs = 2;
    c.num_mini_batches = 2;
    c.learning_rate = 5e-5;
    c.value_learning_rate = 2e-4;
    c.lr_scheduler_type = "constant";
    c.kl_coef = 0.2;
    OK(ctx, rlhf_ppo_open(lm, tok, prompts, rm, NULL, NULL, &c, &t));
    for (int i = 0; i < updates; i++) {
        OK(ctx, rlhf_trainer_step(t));
        double score = rlhf_trainer_metric(t, "objective/scores");
        kl = rlhf_trainer_metric(t, "objective/kl_exact");
        worst = fmax(worst, kl);
        CHECK_NEAR(rlhf_trainer_metric(t, "val/ratio_first"), 1, 0);
        CHECK(kl >= -1e-3);
        if (!i) first = score;
        if (i >= updates - 3) last += score / 3;
    }
    double after = mentions(ctx, lm, tok);
    printf(", score %.2f -> %.2f at KL %.2f (largest %.2f), mentions %.2f -> %.2f ", first, last,
           kl, worst, before, after);
    CHECK_NEAR(first, 0, 0.6); /* normalised on samples of the policy */
    CHECK(last > first + 1);
    CHECK(worst < 10);
    CHECK(after > before + 0.4);
    rlhf_trainer_close(t);
    rlhf_dataset_close(prompts);
    rlhf_model_close(rm);
    rlhf_dataset_close(train);
    rlhf_dataset_close(coins);
    rlhf_dataset_close(shuffled);
    rlhf_dataset_close(held);
    rlhf_samples_free(ctx, p.all, p.n);
    rlhf_model_close(lm);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

/* ---- multi-turn preferences ------------------------------------------------------------------ */

TEST(hh_preferences) {
    NEED_ASSET("datasets/hh_harmless_prefs.jsonl.gz");
    rlhf_ctx *ctx = test_context("auto", 0);
    rlhf_tokenizer *tok = NULL;
    rlhf_model *lm = open_model(ctx, "babyllama361"), *m = NULL;
    OK(ctx, rlhf_tokenizer_open(ctx, test_asset("models/babyllama361"), &tok));
    REQUIRE(lm && tok);
    rlhf_data_config dc = rlhf_data_config_default(RLHF_DATA_PREFERENCE);
    rlhf_dataset *d = NULL;
    dc.max_length = 256;
    dc.max_records = test_quick() ? 8 : 48;
    OK(ctx, rlhf_dataset_open(ctx, test_asset("datasets/hh_harmless_prefs.jsonl.gz"), tok, &dc,
                              &d));
    REQUIRE(d != NULL);
    CHECK_EQ_I(rlhf_dataset_count(d), dc.max_records);
    CHECK(rlhf_dataset_dropped(d) > 0);
    int turns = 0;
    for (int i = 0; i < d->n; i++) {
        const data_seq *s = &d->record[i].a;
        const char *second = strstr(d->record[i].line, "\"assistant\"");
        turns += second != NULL;
        /* Loss: one run of tokens at the end, the answer and its end. */
        int from = s->n;
        while (from > 0 && s->loss[from - 1]) from--;
        CHECK(from < s->n && from > 0 && s->ids[s->n - 1] == tok->eos);
        for (int t = 0; t < from; t++) CHECK(!s->loss[t]);
    }
    CHECK(turns > 0);
    rlhf_rm_config c = rlhf_rm_config_default();
    rlhf_trainer *t = NULL;
    c.learning_rate = 1e-4;
    c.normalize_samples = test_quick() ? 8 : 32;
    c.response_length = 24;
    OK(ctx, rlhf_model_clone(lm, RLHF_HEAD_SCORE, &m));
    OK(ctx, rlhf_rm_open(m, lm, tok, d, d, &c, &t));
    OK(ctx, rlhf_trainer_run(t));
    double loss = rlhf_trainer_metric(t, "eval_loss");
    printf(" %d pairs, %d with several turns, loss %.3f ", d->n, turns, loss);
    CHECK(isfinite(loss) && loss < 1);
    CHECK(isfinite(rlhf_trainer_metric(t, "score_std")));
    rlhf_trainer_close(t);
    rlhf_model_close(m);
    rlhf_model_close(lm);
    rlhf_dataset_close(d);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

TEST_MAIN(CASE(babyllama361), CASE(stories260K), CASE(gpt_nano_sort), CASE(llama_fixture_ferric),
          CASE(sft_lowers_perplexity), CASE(bfloat16_within_the_spread_of_seeds),
          CASE(reward_model_and_ppo), CASE(hh_preferences))
