/* PPO where the answer is known: with rewards R and a KL penalty of weight beta the best policy is
 * ref(y) e^(R(y) / beta), normalised. Tiny models on a vocabulary of a few tokens, so that the
 * policy can be summed over all answers y exactly. */

#include "../rlhf.c"
#include "test.h"

static const char model_config[] =
    "{\"model_type\":\"llama\",\"vocab_size\":%d,\"hidden_size\":16,\"num_hidden_layers\":1,"
    "\"num_attention_heads\":2,\"intermediate_size\":32,\"max_position_embeddings\":8,"
    "\"initializer_range\":0.3%s}";

/* A game: answers of at most `length` tokens to one prompt; an answer ends with `eos`. The prompt
 * is the last token, which eos is too: were it one that an answer goes on from, attention would see
 * the same value twice, and one layer could not tell the second token's state from the first's. */
typedef struct game {
    int vocab, length, eos; /* eos -1: every answer has the whole length */
    double temperature, beta, lr;
    const char *reward_at;
    int updates, batch, whiten, epochs, shared;
    double allowed; /* total variation */
    rlhf_ctx *ctx;
    rlhf_model *m;
    rlhf_dataset *d;
    int32_t prompt[1];
    uint8_t loss[1];
} game;

/* The reward of an answer: uneven over first tokens, and not a sum over tokens. */
static double game_reward(const game *g, const int32_t *y, int n) {
    static const double first[] = {0.3, -0.6, 1, 0, -1, 0.5, 0.8, -0.2};
    double r = first[y[0]];
    if (n > 1) r += 0.6 * first[(y[0] * 3 + y[1] + 1) % g->vocab] - 1.5 * (y[1] == y[0]);
    return r;
}

static rlhf_status reward_fn(void *user, const rlhf_sample *s, int n, float *reward) {
    for (int i = 0; i < n; i++)
        reward[i] = (float)game_reward(user, s[i].completion_ids, s[i].n_completion);
    return RLHF_OK;
}

static void game_open(rlhf_ctx *ctx, void *arg) {
    game *g = arg;
    char text[512], eos[64] = "";
    if (g->eos >= 0) snprintf(eos, sizeof eos, ",\"eos_token_id\":%d", g->eos);
    snprintf(text, sizeof text, model_config, g->vocab, eos);
    json_src src = json_source(ctx, "config.json");
    json_t *config = json_parse(&src, text, strlen(text));
    g->m = model_new(ctx, &src, config);
    model_place(g->m, NULL);
    g->m->config = config;
    err_keep(ctx);
    model_randomize(g->m, 5);
    g->d = mem_zalloc(ctx, 1, sizeof *g->d);
    g->d->ctx = g->d->store.ctx = ctx;
    g->d->config = rlhf_data_config_default(RLHF_DATA_PROMPT);
    g->d->n = 1;
    g->d->record = arena_alloc(&g->d->store, sizeof *g->d->record);
    *g->d->record = (data_record){.weight = 1, .a = {1, g->prompt, g->loss}};
    g->prompt[0] = g->vocab - 1;
}

/* ---- the policy, summed ---------------------------------------------------------------------- */

enum { MAX_ANSWERS = 256 };

/* Probabilities of all answers under the model, in one fixed order; and their rewards. */
typedef struct answers {
    int n;
    double p[MAX_ANSWERS], reward[MAX_ANSWERS];
} answers;

static void softmax_after(const game *g, const int32_t *ids, int n, double *p) {
    float logits[8 * 8];
    double max = -INFINITY, sum = 0;
    CHECK_EQ_I(rlhf_model_logits(g->m, ids, n, logits), RLHF_OK);
    const float *z = logits + (n - 1) * g->vocab;
    for (int i = 0; i < g->vocab; i++) max = fmax(max, (double)z[i] / g->temperature);
    for (int i = 0; i < g->vocab; i++) sum += p[i] = exp((double)z[i] / g->temperature - max);
    for (int i = 0; i < g->vocab; i++) p[i] /= sum;
}

/* Adds every answer that goes on from the n tokens in ids, the first of which is the prompt. */
static void answers_from(const game *g, int32_t *ids, int n, double so_far, answers *a) {
    double p[8];
    softmax_after(g, ids, n, p);
    for (int i = 0; i < g->vocab; i++) {
        ids[n] = i;
        if (i != g->eos && n < g->length) {
            answers_from(g, ids, n + 1, so_far * p[i], a);
            continue;
        }
        a->p[a->n] = so_far * p[i];
        a->reward[a->n++] = game_reward(g, ids + 1, n);
    }
}

static answers answers_of(const game *g) {
    int32_t ids[8] = {g->vocab - 1};
    answers a = {0};
    answers_from(g, ids, 1, 1, &a);
    return a;
}

/* From reference to optimum, in place. */
static void tilt(answers *a, double beta) {
    double sum = 0;
    for (int i = 0; i < a->n; i++) sum += a->p[i] *= exp(a->reward[i] / beta);
    for (int i = 0; i < a->n; i++) a->p[i] /= sum;
}

static double distance(const answers *a, const answers *b) {
    double sum = 0;
    for (int i = 0; i < a->n; i++) sum += fabs(a->p[i] - b->p[i]) / 2;
    return sum;
}

/* ---- games ----------------------------------------------------------------------------------- */

static rlhf_ppo_config game_config(const game *g) {
    rlhf_ppo_config c = rlhf_ppo_config_default();
    c.learning_rate = g->lr;
    c.max_steps = g->updates;
    c.batch_size = c.per_device_train_batch_size = g->batch;
    c.num_ppo_epochs = g->epochs;
    c.num_mini_batches = 2;
    c.response_length = g->length;
    c.temperature = g->temperature;
    c.kl_coef = g->beta;
    c.lam = 1;
    c.vf_coef = 1;
    c.cliprange_value = 10;
    c.whiten_advantages = g->whiten;
    c.reward_at = g->reward_at;
    c.shared_trunk = g->shared;
    return c;
}

static void game_play(game *g) {
    rlhf_trainer *t = NULL;
    g->ctx = test_context("auto", 1);
    REQUIRE(g->ctx);
    CHECK_EQ_I(test_call(g->ctx, game_open, g), RLHF_OK);
    REQUIRE(g->d);
    rlhf_ppo_config c = game_config(g);
    answers ref = answers_of(g), best = ref;
    tilt(&best, g->beta);
    CHECK_EQ_I(rlhf_ppo_open(g->m, NULL, g->d, NULL, reward_fn, g, &c, &t), RLHF_OK);
    REQUIRE(t);
    CHECK_EQ_I(rlhf_trainer_run(t), RLHF_OK);
    CHECK_EQ_S(rlhf_error(g->ctx), "");
    answers end = answers_of(g);

    double kl = 0, score = 0, off = distance(&end, &best);
    for (int i = 0; i < end.n; i++) {
        kl += end.p[i] * log(end.p[i] / ref.p[i]);
        score += end.p[i] * end.reward[i];
    }
    if (getenv("RLHF_TEST_VERBOSE"))
        printf("[%d answers: total variation %.4f at the start, %.4f at the end; KL %.3f, "
               "score %.3f] ", end.n, distance(&ref, &best), off, kl, score);
    CHECK(distance(&ref, &best) > 0.2);
    CHECK(off < g->allowed);
    /* What the last update reports is an estimate of the same from its batch. */
    CHECK_NEAR(rlhf_trainer_metric(t, "objective/kl_exact"), kl, 0.1);
    CHECK_NEAR(rlhf_trainer_metric(t, "objective/scores"), score, 0.15);
    rlhf_trainer_close(t);
    rlhf_dataset_close(g->d);
    rlhf_model_close(g->m);
    rlhf_close(g->ctx);
}

TEST(bandit) {
    game_play(&(game){.vocab = 6, .length = 1, .eos = -1, .temperature = 1, .beta = 0.4,
                      .lr = 1e-2, .reward_at = "eos", .updates = 150, .batch = 256, .epochs = 2,
                      .allowed = 0.01});
}

/* All distributions are those at the sampling temperature; whitening only scales the step. */
TEST(bandit_at_temperature) {
    if (test_quick()) SKIP("not in the quick run");
    game_play(&(game){.vocab = 5, .length = 1, .eos = -1, .temperature = 0.7, .beta = 0.5,
                      .lr = 1e-2, .reward_at = "eos", .updates = 150, .batch = 256, .epochs = 2,
                      .whiten = 1, .allowed = 0.01});
}

/* Answers that end early among others that do not: thirteen of them. */
TEST(answers_of_two_tokens) {
    if (test_quick()) SKIP("not in the quick run");
    game_play(&(game){.vocab = 4, .length = 2, .eos = 3, .temperature = 1, .beta = 0.7,
                      .lr = 1e-2, .reward_at = "eos", .updates = 200, .batch = 384, .epochs = 2,
                      .allowed = 0.01});
}

TEST(answers_rewarded_behind_the_end) {
    if (test_quick()) SKIP("not in the quick run");
    game_play(&(game){.vocab = 4, .length = 2, .eos = 3, .temperature = 1, .beta = 0.7,
                      .lr = 1e-2, .reward_at = "p1", .updates = 200, .batch = 384, .epochs = 2,
                      .allowed = 0.01});
}

/* Policy and values from one trunk, whose two losses pull at the same weights. */
TEST(answers_of_two_tokens_with_one_trunk) {
    game_play(&(game){.vocab = 4, .length = 2, .eos = 3, .temperature = 1, .beta = 0.7,
                      .lr = 1e-2, .reward_at = "eos", .updates = 200, .batch = 384, .epochs = 2,
                      .shared = 1, .allowed = 0.01});
}

/* Hashes of policy and value model after a few updates, where batches are cut so and so. */
static void few_updates(const char *reward_at, int shared, double vf_coef, int batch, int threads,
                        uint64_t *hash) {
    game g = {.vocab = 4, .length = 3, .eos = 3, .temperature = 0.9, .beta = 0.3, .lr = 1e-2,
              .reward_at = reward_at, .updates = 4, .batch = 48, .whiten = 1, .epochs = 2,
              .shared = shared};
    rlhf_trainer *t = NULL;
    g.ctx = test_context("auto", threads);
    REQUIRE(g.ctx);
    CHECK_EQ_I(test_call(g.ctx, game_open, &g), RLHF_OK);
    rlhf_ppo_config c = game_config(&g);
    c.per_device_train_batch_size = batch;
    c.vf_coef = vf_coef;
    CHECK_EQ_I(rlhf_ppo_open(g.m, NULL, g.d, NULL, reward_fn, &g, &c, &t), RLHF_OK);
    CHECK_EQ_I(rlhf_trainer_run(t), RLHF_OK);
    CHECK_EQ_S(rlhf_error(g.ctx), "");
    hash[0] = model_hash(g.m);
    hash[1] = model_hash(t->value);
    rlhf_trainer_close(t);
    rlhf_dataset_close(g.d);
    rlhf_model_close(g.m);
    rlhf_close(g.ctx);
}

/* Where values are not trained it is the same to the bit which trunk they would be read from, also
 * where states behind an answer's end have one. */
TEST(one_trunk_is_the_policy) {
    static const char *const at[] = {"eos", "p1"};
    uint64_t apart[2], one[2], trained[2];
    for (int i = 0; i < 2; i++) {
        few_updates(at[i], 0, 0, 24, 1, apart);
        few_updates(at[i], 1, 0, 24, 1, one);
        few_updates(at[i], 1, 1, 24, 1, trained);
        CHECK(one[0] == apart[0]);
        CHECK(trained[0] != apart[0]); /* the value loss reaches the trunk */
    }
}

/* A trunk that both losses train has the same bits however a minibatch is cut. */
TEST(one_trunk_in_any_batch) {
    static const char *const at[] = {"eos", "p1"};
    uint64_t one[2][2], other[2];
    for (int i = 0; i < 2; i++) {
        few_updates(at[i], 1, 1, 24, 1, one[i]);
        few_updates(at[i], 1, 1, 5, 3, other);
        CHECK(one[i][0] == other[0] && one[i][1] == other[1]);
    }
    CHECK(one[0][1] != one[1][1]);
}

TEST_MAIN(CASE(bandit), CASE(bandit_at_temperature), CASE(answers_of_two_tokens),
          CASE(answers_rewarded_behind_the_end), CASE(answers_of_two_tokens_with_one_trunk),
          CASE(one_trunk_is_the_policy), CASE(one_trunk_in_any_batch))
