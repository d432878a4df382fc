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
    gen_config c = {.max_new = a->max_new, .batch = a->batch, .temperature = 1, .top_p = 1,
                    .seed = 3, .stop = -1};
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
            int ended = 0;
            alone = (answers){.config = c, .batch = 1, .max_new = max_new};
            run_answers(&alone, 1);
            for (int i = 0; i < ITEMS; i++) ended += alone.n[i] < max_new;
            CHECK(max_new == 1 || (ended > 0 && ended < ITEMS));
            for (size_t k = 0; k < sizeof batches / sizeof *batches; k++) {
                other = (answers){.config = c, .batch = batches[k], .max_new = max_new,
                                  .order = k % 2};
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

/* Six rows of one prompt and two of another: two rows are computed, the others take what those
 * leave, and only their last tokens go through the model. */
static void admit(rlhf_ctx *ctx, void *arg) {
    (void)arg;
    static answers a;
    rlhf_model *m = model_open(ctx, configs[0]);
    gen_item item[ITEMS];
    gen_row rows[8], hold[8];
    op_kv kv[2 * 8];
    uint8_t busy[8] = {0};
    set_items(&a, item, 24);
    for (int i = 0; i < 8; i++) {
        item[i].prompt = prompts[i % 4 == 3 ? 0 : 4];
        item[i].n_prompt = i % 4 == 3 ? 8 : 12;
    }
    for (int i = 0; i < 16; i++) kv[i] = model_kv_new(m, &m->ws, 32);
    gen_live live = {.slots = 8, .row = rows, .hold = hold, .kv = kv, .busy = busy};
    CHECK_EQ_I(gen_admit(m, &live, item, 0, 7), 7);
    CHECK_EQ_I(live.n, 2);
    CHECK_EQ_I(live.held, 5);
    CHECK_EQ_I(rows[0].past + rows[1].past, 0);
    for (int i = 0; i < 5; i++) CHECK_EQ_I(hold[i].lead, 0);
    /* A row that comes later finds the prompt in the cache of one that has begun to answer. */
    item[0].n = item[3].n = 1;
    CHECK_EQ_I(gen_admit(m, &live, item, 7, 8), 8);
    CHECK_EQ_I(live.n, 3);
    CHECK_EQ_I(rows[2].past, 7);
    CHECK_EQ_I(rows[2].slot, 7);
    model_free(m);
}

TEST(equal_prompts_are_computed_once) {
    rlhf_ctx *ctx = test_context("auto", 1);
    REQUIRE(ctx);
    CHECK_EQ_I(test_call(ctx, admit, NULL), RLHF_OK);
    CHECK_EQ_S(rlhf_error(ctx), "");
    rlhf_close(ctx);
}

TEST_MAIN(CASE(company_changes_nothing), CASE(equal_prompts_are_computed_once))
