/* The arithmetic between scores and steps on a few given numbers: advantages, whitening, the KL
 * controller, schedules, AdamW, clipping, softmax, KL estimates, the clipped losses. The expected
 * values are in test/golden/unit.json, from PyTorch and from the definitions in double precision
 * (test/golden/make_golden.py). Run from the repository's root. */

#include "../rlhf.c"
#include "test.h"

/* ---- the file -------------------------------------------------------------------------------- */

static json_t *unit_file;

/* One part of the file, which stays open until the next part is asked for. */
static json_t *unit(const char *part) {
    json_error_t error;
    json_decref(unit_file);
    unit_file = json_load_file("test/golden/unit.json", 0, &error);
    json_t *j = json_object_get(unit_file, part);
    if (!j) test_fail(__FILE__, __LINE__, "test/golden/unit.json: no \"%s\"", part);
    return j;
}

static json_t *member(const json_t *j, const char *key) {
    json_t *v = json_object_get(j, key);
    if (!v) test_fail(__FILE__, __LINE__, "the golden file lacks \"%s\"", key);
    return v;
}

static double number(const json_t *j, const char *key) {
    return json_number_value(member(j, key));
}

static const char *text(const json_t *j, const char *key) {
    return json_string_value(member(j, key));
}

static double element(const json_t *list, int i) {
    return json_number_value(json_array_get(list, (size_t)i));
}

enum { MAX = 32 };

/* A list of numbers as floats; its length. */
static int floats(const json_t *j, const char *key, float *out) {
    const json_t *list = member(j, key);
    int n = (int)json_array_size(list);
    for (int i = 0; i < n && i < MAX; i++) out[i] = (float)element(list, i);
    return n < MAX ? n : MAX;
}

static void check_list(const json_t *j, const char *key, const float *got, int n, double tol) {
    const json_t *want = member(j, key);
    CHECK_EQ_I(json_array_size(want), n);
    for (int i = 0; i < n; i++)
        if (!(fabs((double)got[i] - element(want, i)) <= tol))
            test_fail(__FILE__, __LINE__, "%s[%d] is %.9g, expected %.9g", key, i, (double)got[i],
                      element(want, i));
}

/* Calls run for each set of kernels this processor has. */
static void for_each_table(void (*run)(const k_table *k)) {
    for (int i = 0; i < K_TABLES; i++)
        if (k_tables[i]->available()) run(k_tables[i]);
}

/* ---- advantages ------------------------------------------------------------------------------ */

/* A row of the file as the rollout would hold it: kl_reward is what the KL penalty gives. */
typedef struct row_space {
    float logp[MAX], ref[MAX], value[MAX], reward[MAX], adv[MAX], ret[MAX];
} row_space;

static roll_row row_of(const json_t *j, row_space *s, int buffer, int p1) {
    roll_row r = {.logp = s->logp, .ref_logp = s->ref, .value = s->value, .reward = s->reward,
                  .adv = s->adv, .ret = s->ret, .n = (int)number(j, "len"),
                  .score = (float)number(j, "score")};
    r.n_value = r.n + (p1 && r.n < buffer);
    floats(j, "values", s->value);
    for (int t = 0; t < r.n; t++) {
        s->logp[t] = (float)-element(member(j, "kl_reward"), t);
        s->ref[t] = 0;
    }
    return r;
}

TEST(gae) {
    const json_t *gae = unit("gae"), *rows = member(gae, "rows");
    size_t i, k;
    json_t *c;
    json_array_foreach(member(gae, "cases"), i, c) {
        int p1 = strcmp(text(c, "reward_at"), "p1") == 0;
        for (k = 0; k < json_array_size(rows); k++) {
            row_space s;
            roll_row r = row_of(json_array_get(rows, k), &s, (int)number(gae, "buffer"), p1);
            const json_t *want = json_array_get(member(c, "rows"), k);
            roll_rewards(&r, 1, 0);
            roll_gae(&r, number(c, "gamma"), number(c, "lam"));
            check_list(want, "rewards", r.reward, r.n_value, 1e-6);
            check_list(want, "advantages", r.adv, r.n_value, 1e-6);
            check_list(want, "returns", r.ret, r.n_value, 1e-6);
        }
    }
    CHECK_EQ_I(i, 4);
}

/* With gamma and lambda 1 an advantage is all that is still to come less the value. */
TEST(gae_of_a_whole_return) {
    row_space s;
    roll_row r = {.n = 6, .n_value = 6, .value = s.value, .reward = s.reward, .adv = s.adv,
                  .ret = s.ret};
    double left = 0;
    test_fill(s.value, 6, -2, 2);
    test_fill(s.reward, 6, -2, 2);
    roll_gae(&r, 1, 1);
    for (int t = 5; t >= 0; t--) {
        left += (double)s.reward[t];
        CHECK_NEAR(s.adv[t], left - (double)s.value[t], 1e-5);
        CHECK_NEAR(s.ret[t], left, 1e-5);
    }
}

/* ---- KL -------------------------------------------------------------------------------------- */

TEST(kl_penalty) {
    const json_t *kl = unit("kl");
    for (int k3 = 0; k3 < 2; k3++) {
        row_space s;
        roll_row r = {.logp = s.logp, .ref_logp = s.ref, .reward = s.reward};
        r.n = r.n_value = floats(kl, "logprobs", s.logp);
        floats(kl, "ref_logprobs", s.ref);
        double sum = 0, coef = 0.25, got = roll_rewards(&r, coef, k3);
        const json_t *want = member(kl, k3 ? "k3" : "k1");
        for (int t = 0; t < r.n; t++) {
            CHECK_NEAR(r.reward[t], -coef * element(want, t), 1e-6);
            sum += -coef * element(want, t);
        }
        CHECK_NEAR(got, sum, 2e-6);
    }
}

static void exact_kl(const k_table *k) {
    const json_t *kl = unit("kl");
    float p[MAX], q[MAX];
    size_t i;
    json_t *c;
    int n = floats(kl, "policy_logits", p);
    floats(kl, "ref_logits", q);
    json_array_foreach(member(kl, "exact"), i, c) {
        float scale = 1.0f / (float)number(c, "temperature");
        float lse_p = k->stats(n, p, scale).lse, lse_q = k->stats(n, q, scale).lse;
        CHECK_NEAR(k->kl(n, p, q, scale, lse_p, lse_q), number(c, "kl"), 1e-6);
        CHECK_NEAR(k->kl(n, p, p, scale, lse_p, lse_p), 0, 0);
    }
}

TEST(kl_exact) { for_each_table(exact_kl); }

TEST(kl_controller) {
    size_t i;
    json_t *c;
    json_array_foreach(unit("adaptive_kl"), i, c)
        CHECK_NEAR(roll_adapt_kl(number(c, "coef"), number(c, "kl"), number(c, "target"),
                                 (int)number(c, "n_steps"), number(c, "horizon")),
                   number(c, "next"), 1e-15);
    CHECK_EQ_I(i, 4);
}

/* ---- whitening ------------------------------------------------------------------------------- */

/* Masked entries lie between the pieces that are whitened together. */
static void whiten_case(const json_t *c) {
    float x[MAX], want[MAX];
    roll_piece piece[MAX];
    int n = floats(c, "x", x), pieces = 0, keep = !json_is_true(member(c, "shift_mean"));
    floats(c, "y", want);
    for (int i = 0; i < n; i++)
        if (element(member(c, "mask"), i) != 0) piece[pieces++] = (roll_piece){x + i, 1};
    float untouched[MAX];
    memcpy(untouched, x, sizeof x);
    roll_whiten(piece, pieces, keep);
    for (int i = 0; i < n; i++) {
        if (element(member(c, "mask"), i) != 0) CHECK_NEAR(x[i], want[i], 1e-6);
        else CHECK_BITS(x + i, untouched + i, 1);
    }
}

/* The file has the biased variance too, which is not computed here. */
TEST(whiten) {
    size_t i;
    json_t *c;
    int tried = 0;
    json_array_foreach(unit("whiten"), i, c) {
        if (!json_is_true(member(c, "unbiased"))) continue;
        whiten_case(c);
        tried++;
    }
    CHECK_EQ_I(tried, 4);
}

TEST(whiten_in_pieces) {
    float a[30], b[30];
    test_fill(a, 30, -3, 5);
    memcpy(b, a, sizeof a);
    roll_piece whole = {a, 30}, part[] = {{b, 4}, {b + 4, 0}, {b + 4, 25}, {b + 29, 1}};
    roll_whiten(&whole, 1, 0);
    roll_whiten(part, 4, 0);
    CHECK_BITS(a, b, 30);
    double mean = 0, var = 0;
    for (int i = 0; i < 30; i++) mean += (double)a[i] / 30;
    for (int i = 0; i < 30; i++) var += ((double)a[i] - mean) * ((double)a[i] - mean) / 29;
    CHECK_NEAR(mean, 0, 1e-6);
    CHECK_NEAR(var, 1, 1e-6);
    float one = 3;
    roll_whiten(&(roll_piece){&one, 1}, 1, 0);
    CHECK_NEAR(one, 3, 0);
}

/* ---- optimizer ------------------------------------------------------------------------------- */

TEST(schedules) {
    size_t i;
    json_t *c;
    json_array_foreach(unit("schedule"), i, c)
        for (int k = 0; k < (int)json_array_size(member(c, "factor")); k++)
            CHECK_NEAR(opt_schedule(text(c, "name"), k, (int64_t)number(c, "warmup"),
                                    (int64_t)number(c, "steps")),
                       element(member(c, "factor"), k), 1e-7);
    CHECK_EQ_I(i, 6);
}

/* One parameter in the middle of others, for every table. */
static void adam_case(const k_table *k, const json_t *c) {
    enum { AT = 17, N = 37 };
    float p[N], g[N], m[N] = {0}, v[N] = {0};
    double beta1 = number(c, "beta1"), beta2 = number(c, "beta2"), lr = number(c, "lr");
    for (int i = 0; i < N; i++) p[i] = (float)number(c, "p0");
    for (int t = 0; t < (int)json_array_size(member(c, "g")); t++) {
        k_adam a = {.lr = (float)lr, .beta1 = (float)beta1, .beta2 = (float)beta2,
                    .rest1 = (float)(1 - beta1), .rest2 = (float)(1 - beta2),
                    .eps = (float)number(c, "eps"),
                    .decay = (float)(1 - lr * number(c, "weight_decay")), .clip = 1,
                    .fix1 = (float)(1 / (1 - pow(beta1, t + 1))),
                    .fix2 = (float)(1 / (1 - pow(beta2, t + 1)))};
        for (int i = 0; i < N; i++) g[i] = (float)element(member(c, "g"), t);
        k->adam(N, p, g, m, v, &a);
        CHECK_NEAR(p[AT], element(member(c, "p"), t), 1e-6 * fabs(number(c, "p0")));
        for (int i = 0; i < N; i++) CHECK_BITS(p + i, p + AT, 1);
    }
}

static void adam_cases(const k_table *k) {
    size_t i;
    json_t *c;
    json_array_foreach(unit("adamw"), i, c) {
        if (strcmp(text(c, "style"), "torch") == 0) adam_case(k, c);
    }
}

TEST(adamw) { for_each_table(adam_cases); }

/* An optimizer over a model of one matrix and one vector, so that opt_step itself is driven. */
static const char one_config[] =
    "{\"model_type\":\"llama\",\"vocab_size\":3,\"hidden_size\":2,\"num_hidden_layers\":1,"
    "\"num_attention_heads\":1,\"intermediate_size\":1,\"max_position_embeddings\":4}";

typedef struct stepper {
    const json_t *c;
    rlhf_model *m;
    opt *o;
} stepper;

static void stepper_open(rlhf_ctx *ctx, void *arg) {
    stepper *s = arg;
    json_src src = json_source(ctx, "config.json");
    json_t *config = json_parse(&src, one_config, strlen(one_config));
    s->m = model_new(ctx, &src, config);
    model_place(s->m, NULL);
    s->m->config = config;
    err_keep(ctx);
    s->o = opt_new(ctx, &s->m, 1);
    opt_attach(s->o);
}

static void stepper_adam(rlhf_ctx *ctx, void *arg) {
    stepper *s = arg;
    (void)ctx;
    opt *o = s->o;
    double lr = number(s->c, "lr");
    o->beta1 = number(s->c, "beta1"), o->beta2 = number(s->c, "beta2");
    o->eps = number(s->c, "eps"), o->weight_decay = number(s->c, "weight_decay");
    float *matrix = model_w(s->m, P_UP_W, 0), *vector = model_w(s->m, P_LNF_W, 0);
    matrix[1] = vector[1] = (float)number(s->c, "p0");
    for (int t = 0; t < (int)json_array_size(member(s->c, "g")); t++) {
        opt_zero(o);
        model_g(s->m, P_UP_W, 0)[1] = (float)element(member(s->c, "g"), t);
        double norm = opt_step(o, &lr), g = fabs(element(member(s->c, "g"), t));
        CHECK_NEAR(norm, g, 1e-7 * g);
        CHECK_EQ_I(o->step, t + 1);
        CHECK_NEAR(matrix[1], element(member(s->c, "p"), t), 1e-6 * fabs(number(s->c, "p0")));
        CHECK_NEAR(vector[1], number(s->c, "p0"), 0); /* no decay */
    }
}

/* max_norm through a whole step: the first moment after it is a tenth of the clipped gradient. */
static void stepper_clip(rlhf_ctx *ctx, void *arg) {
    stepper *s = arg;
    opt *o = s->o;
    double lr = 0;
    float g[MAX];
    /* The last token's row of the embedding, whose gradient is kept by rows; vector and matrix. */
    size_t at[3] = {2 * (size_t)s->m->c.d, model_at(s->m, P_LNF_W, 0), model_at(s->m, P_HEAD, 0)};
    int n = floats(s->c, "g", g);
    o->beta1 = 0.9, o->beta2 = 0.999, o->eps = 1e-8;
    o->max_norm = number(s->c, "max_norm");
    s->m->g[0] = NAN; /* the embedding's place among the gradients: neither read nor written */
    opt_zero(o);
    op_sparse_meet(o->embed[0], 2);
    *op_sparse_row(o->embed[0], 0) = g[0];
    for (int i = 1; i < n; i++) s->m->g[at[i]] = g[i];
    CHECK_NEAR(opt_step(o, &lr), number(s->c, "norm"), 1e-6 * number(s->c, "norm"));
    for (int i = 0; i < n; i++) {
        double want = element(member(s->c, "clipped"), i);
        CHECK_NEAR(o->m[0][at[i]], 0.1 * want, 1e-6 * fabs(want));
    }
    /* A gradient that is not finite changes nothing: neither weights nor moments nor the count. */
    CHECK(isnan(s->m->g[0]));
    CHECK_EQ_I(o->embed[0]->n, 0);
    op_sparse_meet(o->embed[0], 0);
    *op_sparse_row(o->embed[0], 0) = NAN;
    s->m->w[0] = 0.25f;
    float moment = o->m[0][0];
    err_frame frame;
    mem_enter(ctx, &frame);
    if (setjmp(frame.jump) == 0) {
        opt_step(o, &lr);
        mem_leave(ctx, 0);
        CHECK(0);
    } else {
        CHECK_EQ_I(mem_leave(ctx, 1), RLHF_ERR_NUMERIC);
    }
    CHECK_EQ_I(o->step, 1);
    CHECK_NEAR(s->m->w[0], 0.25, 0);
    CHECK_BITS(o->m[0], &moment, 1);
}

static void for_each_case(const char *part, const char *style, rlhf_status want,
                          void (*run)(rlhf_ctx *, void *)) {
    size_t i;
    json_t *c;
    json_array_foreach(unit(part), i, c) {
        if (style && strcmp(text(c, "style"), style)) continue;
        rlhf_ctx *ctx = test_context("auto", 1);
        stepper s = {.c = c};
        REQUIRE(ctx);
        CHECK_EQ_I(test_call(ctx, stepper_open, &s), RLHF_OK);
        if (s.o) {
            CHECK_EQ_I(test_call(ctx, run, &s), want);
            opt_free(s.o);
            model_free(s.m);
        }
        rlhf_close(ctx);
    }
}

TEST(adamw_step) { for_each_case("adamw", "torch", RLHF_OK, stepper_adam); }
TEST(clip) { for_each_case("clip", NULL, RLHF_OK, stepper_clip); }

/* ---- likelihoods ----------------------------------------------------------------------------- */

TEST(logsigmoid) {
    const json_t *j = unit("logsigmoid"), *z = member(j, "z"), *y = member(j, "y");
    for (int i = 0; i < (int)json_array_size(z); i++)
        CHECK_NEAR(-rm_loss(element(z, i)), element(y, i), 1e-15 + 1e-12 * fabs(element(y, i)));
    CHECK(json_array_size(z) > 10);
}

static void softmax_cases(const k_table *k) {
    size_t i;
    json_t *c;
    json_array_foreach(unit("softmax"), i, c) {
        float x[MAX], p[MAX], logp[MAX], scale = 1.0f / (float)number(c, "temperature");
        int n = floats(c, "logits", x);
        k_stats s = k->stats(n, x, scale);
        /* A logit of 5e4 has itself a spacing of 4e-3, its log-probability such an error. */
        double big = 0;
        for (int t = 0; t < n; t++) big = fmax(big, fabs((double)x[t] * (double)scale));
        double tol = 3e-7 * (1 + big);
        CHECK_NEAR(s.lse, number(c, "logsumexp"), tol);
        CHECK_NEAR(s.entropy, number(c, "entropy"), 2e-6 + 1e-7 * big);
        for (int t = 0; t < n; t++) logp[t] = x[t] * scale - s.lse;
        check_list(c, "logprobs", logp, n, 2 * tol);
        memcpy(p, x, sizeof p);
        k->prob(n, p, scale, s.lse);
        check_list(c, "probs", p, n, 2 * tol);
    }
    CHECK_EQ_I(i, 12);
}

TEST(softmax) { for_each_table(softmax_cases); }

TEST(log1) {
    for (int i = 0; i < 1000; i++) {
        float x = test_float(1e-6f, 40);
        CHECK_NEAR(v_log1(x), log((double)x), 2e-7 * (1 + fabs(log((double)x))));
    }
    CHECK_NEAR(v_log1(1), 0, 0);
}

/* ---- the clipped losses ---------------------------------------------------------------------- */

/* The sum over the eight tokens whose mean the file has. */
static double sum_of(const json_t *j, const char *key) { return 8 * number(j, key); }

TEST(policy_loss) {
    const json_t *j = unit("ppo_loss");
    float new_logp[MAX], old[MAX], adv[MAX], coef[MAX], entropy[MAX] = {0};
    int n = floats(j, "new_logprobs", new_logp);
    floats(j, "old_logprobs", old);
    floats(j, "advantages", adv);
    ppo_policy p = {.old = old, .adv = adv, .clip = number(j, "cliprange"), .scale = 1.0 / n};
    /* In two chunks, as a large vocabulary has them. */
    for (int row = 0, k; row < n; row += k) {
        k = row ? n - row : 3;
        op_rows found = {.logp = new_logp + row, .entropy = entropy + row};
        ppo_policy_coef(&p, row, k, &found, coef + row);
    }
    CHECK_EQ_I(n, 8);
    CHECK_NEAR(p.loss, sum_of(j, "pg"), 1e-5);
    CHECK_NEAR(p.kl, sum_of(j, "approxkl"), 1e-6);
    CHECK_NEAR(p.clipped, sum_of(j, "clipfrac"), 0);
    CHECK_NEAR(p.ratio, sum_of(j, "ratio_mean"), 1e-5);
    check_list(j, "grad_logprobs", coef, n, 1e-6);
}

/* A value model's own outputs stand for the file's values: only differences from them count. */
typedef struct value_case {
    rlhf_model *m;
    float mean, std; /* of its normalised scores */
    const json_t *j;
} value_case;

static void value_open(rlhf_ctx *ctx, void *arg) {
    value_case *v = arg;
    json_src src = json_source(ctx, "config.json");
    json_t *config = json_parse(&src, one_config, strlen(one_config));
    json_t *scorer = json_pack("[s]", "LlamaForSequenceClassification");
    json_object_set_new(config, "architectures", scorer);
    json_object_set_new(config, "hidden_size", json_integer(8));
    json_object_set_new(config, "max_position_embeddings", json_integer(16));
    v->m = model_new(ctx, &src, config);
    model_place(v->m, NULL);
    v->m->config = config;
    err_keep(ctx);
    model_randomize(v->m, 3);
    for (int i = 0; i < 8; i++) model_w(v->m, P_SCORE, 0)[i] = test_float(-1, 1);
    v->m->g = mem_zalloc(ctx, v->m->n, sizeof *v->m->g);
    v->m->score_mean = v->mean;
    v->m->score_std = v->std;
}

static void value_run(rlhf_ctx *ctx, void *arg) {
    const value_case *v = arg;
    const json_t *j = v->j;
    float old[MAX], ret[MAX], given[MAX], grad[MAX], x[MAX];
    int n = floats(j, "values", given);
    int32_t ids[MAX] = {0, 1, 2, 1, 0, 2, 2, 1, 0};
    roll_row row = {.ids = ids, .n_prompt = 1, .n = n, .n_value = n, .value = old, .ret = ret};
    roll_row *rows = &row;
    rlhf_trainer t = {.ctx = ctx, .value = v->m, .ws = {.ctx = ctx}};
    ppo_values(&t, &rows, 1);
    memcpy(x, old, sizeof x);
    for (int i = 0; i < n; i++) {
        old[i] = x[i] - (float)(given[i] - (float)element(member(j, "old_values"), i));
        ret[i] = x[i] - (float)(given[i] - (float)element(member(j, "returns"), i));
    }
    ppo_value loss = {.range = number(j, "cliprange_value"), .scale = number(j, "vf_coef") / n};
    ppo_pass(&t, v->m, &rows, 1, NULL, &loss);
    CHECK_NEAR(loss.loss, sum_of(j, "vf"), 2e-5);
    CHECK_NEAR(loss.clipped, sum_of(j, "vf_clipfrac"), 0);
    /* The gradient of the head is the sum of d loss / d value times the state. */
    floats(j, "grad_values", grad);
    int total, *state;
    model_run run = ppo_batch(&t.ws, &rows, 1);
    state = ppo_states(&t.ws, &run, &rows, 1, 1, &total);
    model_forward(v->m, &t.ws, &run);
    model_top top = model_top_fwd(v->m, &t.ws, run.x, state, total);
    for (int k = 0; k < 8; k++) {
        double want = 0;
        for (int i = 0; i < n; i++)
            want += (double)grad[i] / (double)v->std * (double)top.h[i * 8 + k];
        CHECK_NEAR(model_g(v->m, P_SCORE, 0)[k], want, 1e-5);
    }
    arena_free(&t.ws);
}

TEST(value_loss) {
    static const float stds[] = {1, 2.5f};
    for (int i = 0; i < 2; i++) {
        rlhf_ctx *ctx = test_context("auto", 1);
        REQUIRE(ctx);
        value_case v = {.mean = i ? 0.5f : 0, .std = stds[i], .j = unit("ppo_loss")};
        CHECK_EQ_I(test_call(ctx, value_open, &v), RLHF_OK);
        REQUIRE(v.m);
        CHECK_EQ_I(test_call(ctx, value_run, &v), RLHF_OK);
        mem_free(v.m->g);
        model_free(v.m);
        rlhf_close(ctx);
    }
}

TEST_MAIN(CASE(gae), CASE(gae_of_a_whole_return), CASE(kl_penalty), CASE(kl_exact),
          CASE(kl_controller), CASE(whiten), CASE(whiten_in_pieces), CASE(schedules), CASE(adamw),
          CASE(adamw_step), CASE(clip), CASE(logsigmoid), CASE(softmax), CASE(log1),
          CASE(policy_loss), CASE(value_loss))
