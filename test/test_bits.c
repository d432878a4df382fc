/* Training ends in the same bits everywhere: three steps of fine-tuning, one of a reward model and
 * two PPO updates, with every set of kernels, any number of threads, and on every kind of
 * processor, for which the hashes of the final weights are written down here. `make neon` runs
 * this program under an emulator of aarch64. */

#include "../rlhf.c"
#include "test.h"

/* ---- models and data ------------------------------------------------------------------------- */

static const char *const configs[] = {
    "{\"model_type\":\"gpt2\",\"vocab_size\":211,\"n_embd\":48,\"n_layer\":2,\"n_head\":3,"
    "\"n_positions\":64,\"n_inner\":100,\"eos_token_id\":2,\"initializer_range\":0.1}",
    "{\"model_type\":\"llama\",\"vocab_size\":150,\"hidden_size\":40,\"num_hidden_layers\":2,"
    "\"num_attention_heads\":4,\"num_key_value_heads\":2,\"head_dim\":12,"
    "\"intermediate_size\":72,\"max_position_embeddings\":64,\"eos_token_id\":2,"
    "\"initializer_range\":0.1}"};
enum { FAMILIES = 2, STAGES = 4 };

/* After fine-tuning, of the reward model, of the policy and the value model after PPO. */
static const char *const stages[STAGES] = {"sft", "rm", "ppo policy", "ppo value"};
static const uint64_t expected[FAMILIES][STAGES] = {
    {0x52f5052f2c145a91, 0x8ef884a133ab486b, 0xd7efdb56d77234a0, 0xfa8390039a81e817},
    {0xc9975fc02a5ae976, 0x5ef4ae10ed0393e9, 0xdb0780fd4db09b1f, 0xd7ec7d88d3f29954}};

typedef struct bits {
    int family;
    uint64_t hash[STAGES];
} bits;

static rlhf_model *model_open(rlhf_ctx *ctx, const char *text) {
    json_src src = json_source(ctx, "config.json");
    json_t *config = json_parse(&src, text, strlen(text));
    rlhf_model *m = model_new(ctx, &src, config);
    model_place(m, NULL);
    m->config = config;
    err_keep(ctx);
    model_randomize(m, 11);
    return m;
}

/* n tokens, none of them the end, then perhaps the end. */
static data_seq seq_new(rlhf_dataset *d, uint64_t key, int n, int vocab, int loss_from, int end) {
    data_seq s = {.n = n + end};
    s.ids = arena_alloc(&d->store, (size_t)s.n * sizeof *s.ids);
    s.loss = arena_alloc(&d->store, (size_t)s.n);
    for (int i = 0; i < s.n; i++) {
        s.ids[i] = i < n ? 3 + (int32_t)(rng_u64(1, key, (uint64_t)i) % (uint64_t)(vocab - 3)) : 2;
        s.loss[i] = i >= loss_from;
    }
    return s;
}

static rlhf_dataset *dataset_new(rlhf_ctx *ctx, rlhf_data_kind kind, int n, int vocab) {
    rlhf_dataset *d = mem_zalloc(ctx, 1, sizeof *d);
    d->ctx = d->store.ctx = ctx;
    d->config = rlhf_data_config_default(kind);
    d->record = arena_alloc(&d->store, (size_t)n * sizeof *d->record);
    d->n = n;
    for (int i = 0; i < n; i++) {
        data_record *r = d->record + i;
        uint64_t key = 1000 * (uint64_t)kind + 2 * (uint64_t)i;
        *r = (data_record){.weight = i % 2 ? 0.5 : 1, .margin = i % 3 ? 0 : 0.25};
        int prompt = kind == RLHF_DATA_PROMPT;
        r->a = seq_new(d, key, prompt ? 2 + i : 5 + 7 * i % 31, vocab, 1 + i % 3, !prompt);
        if (kind == RLHF_DATA_PREFERENCE)
            r->b = seq_new(d, key + 1, 4 + 5 * i % 23, vocab, 1, 1);
    }
    return d;
}

/* ---- training -------------------------------------------------------------------------------- */

static void train_steps(rlhf_trainer *t) {
    while (t->step < t->total) CHECK_EQ_I(rlhf_trainer_step(t), RLHF_OK);
}

static rlhf_model *train_sft(rlhf_ctx *ctx, bits *b) {
    rlhf_model *m = model_open(ctx, configs[b->family]);
    rlhf_dataset *d = dataset_new(ctx, RLHF_DATA_SFT, 9, m->c.vocab);
    rlhf_sft_config c = rlhf_sft_config_default();
    c.learning_rate = 2e-3;
    c.weight_decay = 0.01;
    c.max_steps = 3;
    c.per_device_train_batch_size = 3;
    c.gradient_accumulation_steps = 2;
    rlhf_trainer *t = sft_open(m, NULL, d, NULL, &c);
    train_steps(t);
    b->hash[0] = model_hash(m);
    train_free(t);
    data_free(d);
    return m;
}

static rlhf_model *train_rm(rlhf_ctx *ctx, rlhf_model *lm, bits *b) {
    rlhf_model *m = ckpt_clone(lm, RLHF_HEAD_SCORE);
    rlhf_dataset *d = dataset_new(ctx, RLHF_DATA_PREFERENCE, 5, m->c.vocab);
    rlhf_rm_config c = rlhf_rm_config_default();
    c.learning_rate = 2e-3;
    c.max_steps = 1;
    c.center_rewards_coefficient = 0.01;
    c.normalize_samples = 0;
    rlhf_trainer *t = rm_open(m, NULL, NULL, d, NULL, &c);
    train_steps(t);
    b->hash[1] = model_hash(m);
    train_free(t);
    data_free(d);
    return m;
}

static void train_ppo(rlhf_ctx *ctx, rlhf_model *policy, rlhf_model *reward, bits *b) {
    rlhf_dataset *d = dataset_new(ctx, RLHF_DATA_PROMPT, 4, policy->c.vocab);
    rlhf_ppo_config c = rlhf_ppo_config_default();
    c.learning_rate = 2e-3;
    c.max_steps = 2;
    c.batch_size = 8;
    c.per_device_train_batch_size = 3;
    c.num_ppo_epochs = 2;
    c.num_mini_batches = 2;
    c.response_length = 8;
    c.missing_eos_penalty = 1;
    c.whiten_rewards = 1;
    rlhf_trainer *t = ppo_open(policy, NULL, d, reward, NULL, NULL, &c);
    train_steps(t);
    b->hash[2] = model_hash(policy);
    b->hash[3] = model_hash(t->value);
    CHECK_NEAR(rlhf_trainer_metric(t, "val/ratio_first"), 1, 0);
    train_free(t);
    data_free(d);
}

static void train_all(rlhf_ctx *ctx, void *arg) {
    bits *b = arg;
    rlhf_model *m = train_sft(ctx, b), *reward = train_rm(ctx, m, b);
    train_ppo(ctx, m, reward, b);
    model_free(reward);
    model_free(m);
}

/* ---- comparison ------------------------------------------------------------------------------ */

static void compare(const char *isa, int threads, int family) {
    bits b = {.family = family};
    rlhf_ctx *ctx = test_context(isa, threads);
    REQUIRE(ctx);
    if (test_call(ctx, train_all, &b) != RLHF_OK)
        test_fail(__FILE__, __LINE__, "%s", rlhf_error(ctx));
    rlhf_close(ctx);
    for (int i = 0; i < STAGES; i++)
        if (b.hash[i] != expected[family][i])
            test_fail(__FILE__, __LINE__,
                      "family %d, isa %s, %d threads, %s: the weights are 0x%016" PRIx64
                      ", expected 0x%016" PRIx64, family, isa, threads, stages[i], b.hash[i],
                      expected[family][i]);
}

TEST(isas) {
    for (int i = 0; i < K_TABLES; i++)
        for (int f = 0; f < FAMILIES && k_tables[i]->available(); f++)
            compare(k_tables[i]->name, 1, f);
}

TEST(threads) {
    static const int threads[] = {2, 3, 5};
    for (int i = 0; i < (test_quick() ? 1 : 3); i++)
        for (int f = 0; f < FAMILIES; f++) compare("auto", threads[i], f);
}

/* The hashes of one run with products of bfloat16. */
static bits half_run(const char *isa, int threads, int family) {
    bits b = {.family = family};
    rlhf_options o = rlhf_options_default();
    rlhf_ctx *ctx = NULL;
    o.isa = isa;
    o.threads = threads;
    o.dtype = "bf16";
    o.hooks = test_hooks();
    o.hooks.log = NULL;
    CHECK(rlhf_open(&ctx, &o) == RLHF_OK);
    if (ctx && test_call(ctx, train_all, &b) != RLHF_OK)
        test_fail(__FILE__, __LINE__, "%s: %s", isa, rlhf_error(ctx));
    rlhf_close(ctx);
    return b;
}

/* With bfloat16 the bits are those of the kernels, for any number of threads; kernels that emulate
 * its products have the same. Nor are they those of f32. */
TEST(bfloat16) {
    for (int f = 0; f < (test_quick() ? 1 : FAMILIES); f++) {
        bits plain = half_run("ref", 1, f);
        CHECK(plain.hash[0] != expected[f][0] && plain.hash[3] != expected[f][3]);
        for (int i = 0; i < K_TABLES; i++) {
            if (!k_tables[i]->available()) continue;
            bits one = half_run(k_tables[i]->name, 1, f);
            if (!k_tables[i]->bf16.peak) CHECK(!memcmp(&one, &plain, sizeof one));
            for (int threads = 2; threads < (test_quick() ? 3 : 6); threads += 3) {
                bits more = half_run(k_tables[i]->name, threads, f);
                CHECK(!memcmp(&one, &more, sizeof one));
            }
        }
    }
}

TEST_MAIN(CASE(isas), CASE(threads), CASE(bfloat16))
