/* Sampling in batches: the same answers, log-probabilities and states as alone, for
 * prompts that repeat, answers that end early, and more items than slots. */

#include "../rlhf.c"
#include "test.h"

static const char *const configs[] = {
    "{'model_type':'gpt2','vocab_size':37,'n_embd':24,'n_layer':2,'n_head':3,'n_positions':40,"
    "'eos_token_id':[2,8,31],'initializer_range':0.3}",
    /* A window shorter than the prompts, keys of fewer heads. */
    "{'model_type':'mistral','vocab_size':37,'hidden_size':16,'num_hidden_layers':2,"
    "'num_attention_heads':2,'num_key_value_heads':1,'intermediate_size':20,"
    "'eos_token_id':[2,8,31],'max_position_embeddings':40,'sliding_window':5,"
    "'initializer_range':0.3}"};
enum { CONFIGS = 2, ITEMS = 23, PROMPTS = 5, ROOM = 9, WIDTH = 24 };

/* All that a run gives, by item. */
typedef struct answers {
    int config, batch, max_new, order; /* order 1: the same items the other way round */
    int top_k;
    double top_p;
    int32_t out[ITEMS][ROOM];
    float logp[ITEMS][ROOM], hidden[ITEMS][ROOM * WIDTH];
    int n[ITEMS], finished[ITEMS];
} answers;

static rlhf_model *model_open(rlhf_ctx *ctx, const char *text) {
    json_src src = json_source(ctx, "config.json");
    char *copy = mem_strdup(ctx, text);
    for (char *p = copy; *p; p++)
        if (*p == '\'') *p = '"';
    json_t *config = json_parse(&src, copy, strlen(copy));
    mem_free(copy);
    rlhf_model *m = model_new(ctx, &src, config);
    model_place(m, NULL);
    m->config = config;
    err_keep(ctx);
    model_randomize(m, 11);
    return m;
}

/* The prompt of item i; some begin alike, and one has a single token. */
static const int32_t prompts[PROMPTS][12] = {{5, 9, 7, 30, 4, 8, 11, 3}, {6},
                                             {5, 9, 7, 30, 4, 8, 11, 20}, {5, 9, 7},
                                             {12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23}};
static const int lengths[PROMPTS] = {8, 1, 8, 3, 12};
static int prompt_of(int i) { return i < 6 ? i % 3 : i < 14 ? 4 : i % PROMPTS; }

static void set_items(answers *a, gen_item *item, size_t d) {
    for (int i = 0; i < ITEMS; i++) {
        int at = a->order ? ITEMS - 1 - i : i;
        item[at] = (gen_item){.prompt = prompts[prompt_of(i)],
                              .n_prompt = lengths[prompt_of(i)],
                              .key = (uint64_t)i,
                              .out = a->out[i],
                              .logp = a->logp[i],
                              .hidden = a->hidden[i]};
        CHECK(d <= WIDTH);
    }
}

static void generate(rlhf_ctx *ctx, void *arg) {
    answers *a = arg;
    rlhf_model *m = model_open(ctx, configs[a->config]);
    gen_item item[ITEMS];
    set_items(a, item, (size_t)m->c.d);
    gen_config c = {.max_new = a->max_new, .batch = a->batch, .temperature = 1,
                    .top_k = a->top_k, .top_p = a->top_p, .seed = 3, .stop = -1};
    gen_run(m, &m->ws, &c, item, ITEMS, NULL);
    for (int i = 0; i < ITEMS; i++) {
        const gen_item *it = item + (a->order ? ITEMS - 1 - i : i);
        a->n[i] = it->n;
        a->finished[i] = it->finished;
    }
    model_free(m);
}

static void run_answers(answers *a, int threads) {
    rlhf_ctx *ctx = test_context("auto", threads);
    REQUIRE(ctx);
    CHECK_EQ_I(test_call(ctx, generate, a), RLHF_OK);
    CHECK_EQ_S(rlhf_error(ctx), "");
    rlhf_close(ctx);
}

static void same_answers(const answers *a, const answers *b, size_t d) {
    for (int i = 0; i < ITEMS; i++) {
        size_t n = (size_t)a->n[i];
        CHECK_EQ_I(a->n[i], b->n[i]);
        CHECK_EQ_I(a->finished[i], b->finished[i]);
        if (a->n[i] != b->n[i]) continue;
        CHECK(!memcmp(a->out[i], b->out[i], n * sizeof *a->out[i]));
        CHECK(!memcmp(a->logp[i], b->logp[i], n * sizeof *a->logp[i]));
        CHECK(!memcmp(a->hidden[i], b->hidden[i], n * d * sizeof *a->hidden[i]));
    }
}

TEST(company_changes_nothing) {
    static answers alone, other;
    static const int batches[] = {2, 3, 7, ITEMS};
    for (int c = 0; c < CONFIGS; c++) {
        size_t d = c ? 16 : 24;
        for (int max_new = 1; max_new <= ROOM; max_new += ROOM - 1) {
            int ended = 0, top_k = c ? 20 : 0;
            double top_p = c ? 0.9 : 1;
            alone = (answers){.config = c, .batch = 1, .max_new = max_new, .top_k = top_k,
                              .top_p = top_p};
            run_answers(&alone, 1);
            for (int i = 0; i < ITEMS; i++) ended += alone.n[i] < max_new;
            CHECK(max_new == 1 || (ended > 0 && ended < ITEMS));
            for (size_t k = 0; k < sizeof batches / sizeof *batches; k++) {
                other = (answers){.config = c, .batch = batches[k], .max_new = max_new,
                                  .order = k % 2, .top_k = top_k, .top_p = top_p};
                run_answers(&other, 1 + (int)k % 3);
                same_answers(&alone, &other, d);
            }
        }
    }
    /* Equal prompts do not give equal answers: each draws numbers of its own. */
    int differ = 0;
    for (int i = 7; i < 14; i++) differ += memcmp(alone.out[i], alone.out[6], sizeof *alone.out);
    CHECK(differ != 0);
}

/* Rows of prompts that begin alike: who computes what, and from where the others have it. */
static void admit(rlhf_ctx *ctx, void *arg) {
    (void)arg;
    static answers a;
    rlhf_model *m = model_open(ctx, configs[0]);
    gen_item item[ITEMS];
    set_items(&a, item, 24);
    static const int of[10] = {4, 4, 4, 0, 4, 2, 3, 4, 0, 1};
    for (int i = 0; i < 10; i++) item[i].prompt = prompts[of[i]], item[i].n_prompt = lengths[of[i]];
    gen_live live = gen_open(m, &m->ws, 8, 32);
    /* Prompts 0, 2 and 3 begin with the same three tokens, 0 and 2 with seven. */
    static const int past[8] = {0, 11, 11, 0, 11, 7, 2, 11}, lead[8] = {0, 0, 0, 0, 0, 3, 3, 0};
    CHECK_EQ_I(gen_admit(m, &live, item, 0, 7), 7);
    CHECK_EQ_I(live.n, 7);
    gen_config c = {.max_new = 4, .batch = 8, .temperature = 1, .top_p = 1, .seed = 3, .stop = 99};
    for (int i = 0; i < 7; i++) {
        CHECK_EQ_I(live.row[i].past, past[i]);
        CHECK_EQ_I(live.row[i].led, past[i]);
        CHECK_EQ_I(live.row[i].lead, lead[i]);
        CHECK_EQ_I(live.held[i], 0);
    }
    gen_step(m, &m->ws, &c, &live);
    for (int i = 0; i < 7; i++) {
        CHECK_EQ_I(live.held[i], item[i].n_prompt);
        CHECK(!memcmp(live.text + 32 * i, item[i].prompt, (size_t)item[i].n_prompt * 4));
    }
    gen_step(m, &m->ws, &c, &live);
    CHECK_EQ_I(live.held[6], 4);
    CHECK_EQ_I(live.text[32 * 6 + 3], item[6].out[0]);
    /* A row that comes later finds its prompt in a cache; in a slot whose row is gone, its own. */
    live.busy[3] = 0;
    live.row[3] = live.row[--live.n];
    CHECK_EQ_I(gen_admit(m, &live, item, 7, 10), 9);
    CHECK_EQ_I(live.n, 8);
    CHECK_EQ_I(live.row[6].slot, 3);
    CHECK_EQ_I(live.row[6].past, 11);
    CHECK_EQ_I(live.row[6].led, 0);
    CHECK_EQ_I(live.held[3], 11);
    CHECK_EQ_I(live.row[7].slot, 7);
    CHECK_EQ_I(live.row[7].past, 7);
    /* Of two new rows the first finds three tokens in a cache, the second these and four more of
     * the first's; its answer is that of a row by itself. */
    static const int two[3] = {3, 0, 2};
    float logp[3];
    for (int i = 0; i < 3; i++) {
        item[i].prompt = prompts[two[i]];
        item[i].n_prompt = lengths[two[i]];
    }
    live = gen_open(m, &m->ws, 3, 32);
    CHECK_EQ_I(gen_admit(m, &live, item, 0, 1), 1);
    gen_step(m, &m->ws, &c, &live);
    CHECK_EQ_I(gen_admit(m, &live, item, 1, 3), 3);
    CHECK_EQ_I(live.row[1].past, 3);
    CHECK_EQ_I(live.row[1].led, 0);
    CHECK_EQ_I(live.row[2].past, 7);
    CHECK_EQ_I(live.row[2].led, 4);
    CHECK_EQ_I(live.row[2].lead, 1);
    CHECK_EQ_I(live.held[2], 3);
    gen_step(m, &m->ws, &c, &live);
    for (int i = 1; i < 3; i++) logp[i] = item[i].logp[0];
    c.batch = c.max_new = 1;
    gen_run(m, &m->ws, &c, item + 1, 2, NULL);
    for (int i = 1; i < 3; i++) CHECK(logp[i] == item[i].logp[0]);
    model_free(m);
}

TEST(equal_prompts_are_computed_once) {
    rlhf_ctx *ctx = test_context("auto", 1);
    REQUIRE(ctx);
    CHECK_EQ_I(test_call(ctx, admit, NULL), RLHF_OK);
    CHECK_EQ_S(rlhf_error(ctx), "");
    rlhf_close(ctx);
}

/* ---- what is left of a distribution ---------------------------------------------------------- */

enum { VOCAB = 5000 };

/* By definition, with all logits sorted: the tokens that are left are all those of at least one
 * logit, which is among the top_k; those above it do not hold top_p of these yet, and with those as
 * likely as it they do (but for single precision). */
static void check_left(int n, const float *x, const gen_config *c, float least) {
    static float sorted[VOCAB];
    double scale = 1.0 / (double)c->temperature, all = 0, above = 0, with = 0;
    memcpy(sorted, x, (size_t)n * sizeof *x);
    qsort(sorted, (size_t)n, sizeof *sorted, gen_greater);
    int keep = c->top_k > 0 && c->top_k < n ? c->top_k : n;
    float last = sorted[keep - 1];
    for (int i = 0; i < n; i++) {
        double p = exp((double)(sorted[i] - sorted[0]) * scale);
        if (sorted[i] >= last) all += p;
        if (sorted[i] > least) above += p;
        if (sorted[i] >= least) with += p;
    }
    CHECK(least >= last);
    CHECK(with / all > c->top_p - 1e-6);
    if (c->top_p == 1) CHECK(least == last);
    else CHECK(above / all < c->top_p + 1e-6);
}

/* Flat, peaked and far logits, with ties; the same in every kernel set. */
TEST(truncation_is_by_rank_and_share) {
    static float x[VOCAB], kept[VOCAB], room[VOCAB];
    static int32_t id[VOCAB];
    static const int sizes[] = {1, 2, 97, 1000, VOCAB}, tops[] = {0, 1, 2, 50, 700};
    static const float spreads[] = {0.01f, 1, 8, 300}, temperatures[] = {0.7f, 1, 1.9f};
    static const double shares[] = {1, 1e-6, 0.2, 0.9, 0.995};
    gen_rows g = {0};
    for (int i = 0; i < 5 * 4 * 3 * 5 * 5; i++) {
        int n = sizes[i % 5], left = 0;
        float spread = spreads[i / 5 % 4], lse = 0;
        gen_config c = {.temperature = temperatures[i / 20 % 3], .top_k = tops[i / 60 % 5],
                        .top_p = shares[i / 300]};
        test_fill(x, (size_t)n, -spread, spread);
        for (int j = 0; j < n; j += 7) x[j] = x[j / 2]; /* ties */
        for (int t = 0; t < K_TABLES && gen_truncates(&c, n); t++) {
            if (!k_tables[t]->available()) continue;
            g.k = k_tables[t], g.c = &c;
            memcpy(kept, x, (size_t)n * sizeof *x);
            k_stats s = g.k->stats(n, x, 1.0f / c.temperature);
            int m = gen_truncate(&g, n, kept, id, room, &s), at = 0;
            float least = INFINITY;
            for (int j = 0; j < m; j++) least = kept[j] < least ? kept[j] : least;
            for (int j = 0; j < n; j++) {
                if (x[j] < least) continue;
                CHECK(at < m && id[at] == j && kept[at] == x[j]);
                at++;
            }
            CHECK_EQ_I(m, at);
            check_left(n, x, &c, least);
            k_stats want = g.k->stats(m, kept, 1.0f / c.temperature);
            CHECK(s.lse == want.lse && s.max == want.max);
            if (left) CHECK(m == left && s.lse == lse);
            left = m, lse = s.lse;
        }
    }
}

/* A model that has diverged: no index leaves the arrays, and something is left. */
TEST(truncation_of_no_numbers) {
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    float x[40], room[40];
    int32_t id[40];
    gen_config c = {.temperature = 1, .top_k = 5, .top_p = 0.5};
    for (int i = 0; i < 3 * 2 * K_TABLES; i++) {
        gen_rows g = {.k = k_tables[i / 6], .c = &c};
        if (!g.k->available()) continue;
        for (int j = 0; j < 40; j++) x[j] = i / 3 % 2 && j % 3 ? (float)j : bad[i % 3];
        k_stats s = g.k->stats(40, x, 1);
        int m = gen_truncate(&g, 40, x, id, room, &s);
        CHECK(m > 0 && m <= 40);
        for (int j = 0; j < m; j++) CHECK(id[j] >= 0 && id[j] < 40 && (!j || id[j] > id[j - 1]));
    }
}

TEST_MAIN(CASE(company_changes_nothing), CASE(equal_prompts_are_computed_once),
          CASE(truncation_is_by_rank_and_share), CASE(truncation_of_no_numbers))
