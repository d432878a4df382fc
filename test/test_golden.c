/* Tiny models of each family against PyTorch (test/golden, where make_golden.py says how the
 * numbers are made): logits, and one training step of each stage with everything on the way to it.
 * The golden values are exact to their printed digits, so a tolerance here is what this library's
 * single precision may lose. Run from the repository's root. */

#include "../rlhf.c"
#include "test.h"

static const char *const families[] = {"gpt2", "llama", "llama_tied"};
enum { FAMILIES = 3 };

static const double logit_tol = 1e-4, value_tol = 2e-5, norm_tol = 1e-4;

/* ---- golden files ---------------------------------------------------------------------------- */

static json_t *golden_open(const char *family) {
    char path[128];
    json_error_t error;
    snprintf(path, sizeof path, "test/golden/%s.json", family);
    json_t *j = json_load_file(path, 0, &error);
    if (!j) test_fail(__FILE__, __LINE__, "%s: %s", path, error.text);
    return j;
}

/* A member that has to be there. */
static json_t *member(const json_t *j, const char *key) {
    json_t *v = json_object_get(j, key);
    if (!v) test_fail(__FILE__, __LINE__, "the golden file lacks \"%s\"", key);
    return v;
}

static double number(const json_t *j, const char *key) {
    return json_number_value(member(j, key));
}

static int count(const json_t *j, const char *key) { return (int)json_array_size(member(j, key)); }

static double element(const json_t *list, int i) {
    return json_number_value(json_array_get(list, (size_t)i));
}

/* The member `key`, a list of n numbers, against got; key null: j is the list. */
static void check_list(const json_t *j, const char *key, const float *got, int n, double tol) {
    const json_t *want = key ? member(j, key) : j;
    CHECK_EQ_I(json_array_size(want), n);
    for (int i = 0; i < n; i++)
        if (!(fabs((double)got[i] - element(want, i)) <= tol))
            test_fail(__FILE__, __LINE__, "%s[%d] is %.9g, expected %.9g (allowed %.2g)",
                      key ? key : "value", i, (double)got[i], element(want, i), tol);
}

static void check_relative(const char *what, double got, double want, double tol) {
    if (!(fabs(got - want) <= tol * fabs(want)))
        test_fail(__FILE__, __LINE__, "%s is %.9g, expected %.9g", what, got, want);
}

/* ---- tensors --------------------------------------------------------------------------------- */

/* How far a tensor's values, and its norm, may be off. */
typedef enum tensor_rule { GRADIENT, UPDATE } tensor_rule;

/* One tensor in the file's order, taken from x, an array laid out as the model's weights. */
static void check_tensor(const rlhf_model *m, const model_tensor *t, int layer, const char *name,
                         const float *x, const json_t *want, tensor_rule rule) {
    ckpt_tensor s = ckpt_tensor_of(m, t, layer, 1);
    const float *at = x + (s.data - m->w);
    size_t cols = s.cols ? s.cols : 1, n = s.rows * cols;
    double norm = number(want, "norm"), sum = 0;
    double tol = rule == UPDATE ? number(want, "tol") : 2e-5 * norm + 1e-7;
    double norm_off = rule == UPDATE ? number(want, "ntol") : norm_tol * norm + 1e-7;
    for (size_t i = 0; i < n; i++) sum += (double)at[i] * (double)at[i];
    if (!(fabs(sqrt(sum) - norm) <= norm_off))
        test_fail(__FILE__, __LINE__, "%s: norm %.9g, expected %.9g (allowed %.2g)", name,
                  sqrt(sum), norm, norm_off);
    for (int list = 0; list < 2; list++)
        for (size_t i = 0; i < 8; i++) {
            const json_t *v = json_array_get(member(want, list ? "spread" : "first"), i);
            size_t flat = list ? i * (n - 1) / 7 : i;
            /* A transposed tensor lies in the file as [cols][rows]. */
            size_t row = ckpt_row(s.rows, s.hd, flat / cols);
            size_t here = s.transposed ? flat % s.rows * cols + flat / s.rows
                                       : row * cols + flat % cols;
            if (json_is_null(v) || fabs((double)at[here] - json_number_value(v)) <= tol) continue;
            test_fail(__FILE__, __LINE__, "%s at %zu: %.9g, expected %.9g (allowed %.2g)", name,
                      flat, (double)at[here], json_number_value(v), tol);
        }
}

/* All tensors of a model: neither one more nor one less than the golden file has. */
static void check_tensors(const rlhf_model *m, const float *x, const json_t *want,
                          tensor_rule rule) {
    size_t seen = 0;
    for (const model_tensor *t = m->family->tensors; t->name; t++)
        for (int l = 0; l < model_param_layers(m, t->param); l++) {
            char name[160];
            ckpt_name(name, sizeof name, m->family, t, l, 1);
            seen++;
            check_tensor(m, t, l, name, x, member(want, name), rule);
        }
    CHECK_EQ_I(seen, json_object_size(want));
}

/* Weights as they are, and what has been added to them since. */
static float *weights_copy(const rlhf_model *m) {
    float *w = malloc(m->n * sizeof *w);
    if (w) memcpy(w, m->w, m->n * sizeof *w);
    return w;
}

static void check_update(const rlhf_model *m, const float *before, const json_t *want) {
    float *diff = weights_copy(m);
    for (size_t i = 0; i < m->n; i++) diff[i] -= before[i];
    check_tensors(m, diff, want, UPDATE);
    free(diff);
}

/* Puts the rows of embeddings' gradients where the rest is: of those that are heads, too, which a
 * step does before it takes the norm, or of the others, which a step leaves apart. */
static void join(opt *o, int joined) {
    for (int i = 0; i < o->models; i++) {
        if (!o->embed[i] || opt_joined(o->model[i]) != joined) continue;
        memset(o->g[i], 0, opt_untouched(o->model[i]) * sizeof(float));
        opt_join(o, i);
    }
}

/* Sum of squares of a model's gradients. */
static double gradient_square(const rlhf_model *m) {
    double sum = 0;
    for (size_t i = 0; i < m->n; i++) sum += (double)m->g[i] * (double)m->g[i];
    return sum;
}

/* ---- what is tested -------------------------------------------------------------------------- */

/* A family's golden file and its model; opened anew for each way of cutting the batch. */
typedef struct golden {
    rlhf_ctx *ctx;
    rlhf_model *m;
    json_t *j;
    int batch; /* per_device_train_batch_size */
} golden;

static void for_each_family(const char *part, int batches, void (*run)(rlhf_ctx *, void *)) {
    static const int cuts[] = {16, 1, 2};
    for (int f = 0; f < FAMILIES; f++)
        for (int b = 0; b < batches; b++) {
            int failed = test_failures;
            char dir[128];
            snprintf(dir, sizeof dir, "test/golden/%s", families[f]);
            golden g = {.ctx = test_context("auto", 1), .batch = cuts[b]};
            json_t *file = golden_open(families[f]);
            REQUIRE(g.ctx && file);
            CHECK_EQ_I(rlhf_model_open(g.ctx, dir, &g.m), RLHF_OK);
            REQUIRE(g.m);
            g.j = member(file, part);
            CHECK_EQ_I(rlhf_model_get_shape(g.m).n_params, number(file, "params"));
            if (test_call(g.ctx, run, &g) != RLHF_OK)
                test_fail(__FILE__, __LINE__, "%s: %s", families[f], rlhf_error(g.ctx));
            rlhf_model_close(g.m);
            rlhf_close(g.ctx);
            json_decref(file);
            if (test_failures > failed)
                printf("\n    (family %s, micro-batches of %d)", families[f], cuts[b]);
        }
}

/* A dataset made by hand of n records, whose tokens are filled in by record_ids. */
static rlhf_dataset *dataset_new(rlhf_ctx *ctx, rlhf_data_kind kind, int n) {
    rlhf_dataset *d = mem_zalloc(ctx, 1, sizeof *d);
    d->ctx = d->store.ctx = ctx;
    d->config = rlhf_data_config_default(kind);
    d->record = arena_alloc(&d->store, (size_t)n * sizeof *d->record);
    memset(d->record, 0, (size_t)n * sizeof *d->record);
    d->n = n;
    for (int i = 0; i < n; i++) d->record[i].weight = 1;
    return d;
}

static data_seq seq_new(rlhf_dataset *d, const json_t *ids, int loss_from) {
    data_seq s = {.n = (int)json_array_size(ids)};
    s.ids = arena_alloc(&d->store, (size_t)s.n * sizeof *s.ids);
    s.loss = arena_alloc(&d->store, (size_t)s.n);
    for (int i = 0; i < s.n; i++) {
        s.ids[i] = (int32_t)element(ids, i);
        s.loss[i] = i >= loss_from;
    }
    return s;
}

/* The settings that the three stages share, as the golden file has them. */
static void common_config(const json_t *j, int batch, train_config *c) {
    c->learning_rate = number(j, json_object_get(j, "lr") ? "lr" : "learning_rate");
    c->lr_scheduler_type = "constant";
    c->adam_beta1 = number(j, "beta1");
    c->adam_beta2 = number(j, "beta2");
    c->adam_epsilon = number(j, "eps");
    c->weight_decay = number(j, "weight_decay");
    c->max_grad_norm = number(j, "max_grad_norm");
    c->shuffle_dataset = 0;
    c->max_steps = 10;
    c->per_device_train_batch_size = batch;
}

/* ---- forward --------------------------------------------------------------------------------- */

static void forward_run(rlhf_ctx *ctx, void *arg) {
    const golden *g = arg;
    size_t i;
    json_t *seq;
    (void)ctx;
    json_array_foreach(member(g->j, "sequences"), i, seq) {
        int n = count(seq, "ids"), vocab = g->m->c.vocab;
        int32_t ids[64];
        float logits[64 * 128], logp[64];
        for (int t = 0; t < n; t++) ids[t] = (int32_t)element(member(seq, "ids"), t);
        CHECK_EQ_I(rlhf_model_logits(g->m, ids, n, logits), RLHF_OK);
        CHECK_EQ_I(rlhf_model_logprobs(g->m, ids, n, logp), RLHF_OK);
        CHECK_EQ_I(count(seq, "logits"), n);
        for (int t = 0; t < n; t++)
            for (int v = 0; v < vocab; v++) {
                double want = element(json_array_get(member(seq, "logits"), (size_t)t), v);
                CHECK_NEAR(logits[t * vocab + v], want, logit_tol);
            }
        check_list(seq, "logprobs", logp, n - 1, value_tol);
    }
}

TEST(logits) { for_each_family("forward", 1, forward_run); }

/* ---- further families ------------------------------------------------------------------------ */

/* A family of families.json: made by transformers in single precision, which rounds by itself. */
static void further_grads(const rlhf_model *m, const json_t *want) {
    size_t seen = 0;
    for (const model_tensor *t = m->family->tensors; t->name; t++)
        for (int l = 0; l < model_param_layers(m, t->param); l++) {
            ckpt_tensor x = ckpt_tensor_of(m, t, l, 1);
            const json_t *grad = json_object_get(want, x.name);
            if (!grad) continue;
            const float *at = m->g + (x.data - m->w);
            size_t cols = x.cols ? x.cols : 1, n = x.rows * cols;
            double sum = 0, norm = number(grad, "norm");
            for (size_t i = 0; i < n; i++) sum += (double)at[i] * (double)at[i];
            check_relative(x.name, sqrt(sum), norm, norm_tol);
            for (size_t i = 0; i < 8; i++) {
                size_t flat = i * (n - 1) / 7;
                size_t here = ckpt_row(x.rows, x.hd, flat / cols) * cols + flat % cols;
                CHECK_NEAR(at[here], element(member(grad, "spread"), (int)i), 1e-4 * norm);
            }
            seen++;
        }
    CHECK_EQ_I(seen, json_object_size(want));
}

static void further_coef(void *user, int row, int n, const op_rows *found, float *coef) {
    (void)row, (void)found;
    for (int i = 0; i < n; i++) coef[i] = (float)(-1.0 / *(int *)user);
}

static void further_run(rlhf_ctx *ctx, void *arg) {
    const golden *g = arg;
    rlhf_model *m = g->m;
    int n = count(g->j, "ids"), row[64], labels = n - 1;
    int32_t ids[64], more[64];
    const int32_t *seq = ids;
    float logits[64 * 64], logp[64];
    for (int t = 0; t < n; t++) ids[t] = (int32_t)element(member(g->j, "ids"), t), row[t] = t;
    CHECK_EQ_I(rlhf_model_logits(m, ids, n, logits), RLHF_OK);
    for (int k = 0; k < 2; k++)
        check_list(json_array_get(member(g->j, "logits"), (size_t)k), NULL,
                   logits + (int)element(member(g->j, "rows"), k) * m->c.vocab, m->c.vocab,
                   logit_tol);
    CHECK_EQ_I(rlhf_model_logprobs(m, ids, n, logp), RLHF_OK);
    check_list(g->j, "logprobs", logp, labels, logit_tol);
    /* Greedy, with a cache. */
    gen_config c = {.max_new = count(g->j, "greedy"), .batch = 1, .top_p = 1, .stop = -1};
    gen_item item = {.prompt = ids, .n_prompt = 6, .out = more};
    arena_reset(&m->ws);
    gen_run(m, &m->ws, &c, &item, 1, NULL);
    CHECK_EQ_I(item.n, c.max_new);
    for (int i = 0; i < item.n; i++) CHECK_EQ_I(more[i], element(member(g->j, "greedy"), i));
    /* The gradient of the mean cross-entropy. */
    model_thaw(m);
    m->g = mem_zalloc(ctx, m->n, sizeof *m->g);
    arena_reset(&m->ws);
    op_env e = {ctx, &m->ws};
    model_run run = model_batch(&m->ws, 1, &seq, &n, NULL);
    run.save = 1;
    model_forward(m, &m->ws, &run);
    model_top top = model_top_fwd(m, &m->ws, run.x, row, labels);
    op_weight w = model_head_weight(m, labels);
    op_rows found = {.logp = logp};
    float *dh = arena_floats(&m->ws, (size_t)labels, (size_t)m->c.d);
    op_vocab_run(&e, &w, labels, top.h, ids + 1, 1, &found, further_coef, &labels, dh);
    model_backward(m, &m->ws, &run, model_top_bwd(m, &m->ws, &top, dh, n));
    further_grads(m, member(g->j, "grads"));
    mem_free(m->g);
    m->g = NULL;
}

TEST(further_families) {
    json_t *file = golden_open("families"), *j;
    const char *name;
    REQUIRE(file);
    json_object_foreach(file, name, j) {
        int failed = test_failures;
        char dir[128];
        snprintf(dir, sizeof dir, "test/golden/%s", name);
        golden g = {.ctx = test_context("auto", 2), .j = j};
        CHECK_EQ_I(rlhf_model_open(g.ctx, dir, &g.m), RLHF_OK);
        if (g.m) CHECK_EQ_I(test_call(g.ctx, further_run, &g), RLHF_OK);
        if (test_failures > failed) printf("\n    (family %s: %s)", name, rlhf_error(g.ctx));
        rlhf_model_close(g.m);
        rlhf_close(g.ctx);
    }
    json_decref(file);
}

/* ---- fine-tuning ----------------------------------------------------------------------------- */

/* Loss, hits and gradients of the whole batch, in micro-batches. */
static void sft_gradients(const golden *g, rlhf_trainer *t) {
    const data_seq *seq[3];
    int n = t->train->n, labels = (int)number(g->j, "labels");
    for (int i = 0; i < n; i++) seq[i] = &t->train->record[i].a;
    sft_sums sums = {0};
    opt_attach(t->opt);
    opt_zero(t->opt);
    for (int i = 0; i < n; i += g->batch) {
        sft_part part = {1.0 / labels, 0, i};
        sft_pass(g->m, &t->ws, seq + i, base_min(g->batch, n - i), &part, &sums);
    }
    CHECK_EQ_I(sums.tokens, labels);
    CHECK_EQ_I(sums.hits, number(g->j, "hits"));
    CHECK_NEAR(sums.nll / labels, number(g->j, "loss"), value_tol);
    join(t->opt, 1);
    check_relative("gradient norm", opt_norm(t->opt), number(g->j, "grad_norm"), norm_tol);
    join(t->opt, 0);
    check_tensors(g->m, g->m->g, member(g->j, "grads"), GRADIENT);
}

static void sft_run(rlhf_ctx *ctx, void *arg) {
    const golden *g = arg;
    const json_t *batch = member(g->j, "batch"), *losses = member(g->j, "losses");
    int n = (int)json_array_size(batch);
    rlhf_dataset *d = dataset_new(ctx, RLHF_DATA_SFT, n);
    for (int i = 0; i < n; i++) {
        const json_t *s = json_array_get(batch, (size_t)i);
        d->record[i].a = seq_new(d, member(s, "ids"), (int)number(s, "loss_from"));
    }
    rlhf_sft_config c = rlhf_sft_config_default();
    train_config common;
    memcpy(&common, &c, sizeof common);
    common_config(g->j, g->batch, &common);
    memcpy(&c, &common, sizeof common);
    c.gradient_accumulation_steps = (n + g->batch - 1) / g->batch;
    rlhf_trainer *t = sft_open(g->m, NULL, d, NULL, &c);
    sft_gradients(g, t);
    float *before = weights_copy(g->m);
    double after = number(g->j, "after_tol");
    for (int step = 0; step < 3; step++) {
        CHECK_EQ_I(rlhf_trainer_step(t), RLHF_OK);
        CHECK_NEAR(rlhf_trainer_metric(t, "loss"), element(losses, step), step ? after : value_tol);
        if (step) continue;
        CHECK_NEAR(rlhf_trainer_metric(t, "mean_token_accuracy"), number(g->j, "accuracy"), 1e-8);
        check_relative("grad_norm", rlhf_trainer_metric(t, "grad_norm"), number(g->j, "grad_norm"),
                       norm_tol);
        check_update(g->m, before, member(g->j, "update"));
    }
    const data_seq *seq[] = {&d->record[0].a, &d->record[1].a, &d->record[2].a};
    sft_sums sums = {0};
    arena_reset(&t->ws);
    sft_pass(g->m, &t->ws, seq, n, NULL, &sums);
    CHECK_NEAR(sums.nll / (double)sums.tokens, number(g->j, "loss_after"), after);
    free(before);
    train_free(t);
    data_free(d);
}

TEST(sft) { for_each_family("sft", 3, sft_run); }

/* ---- reward model ---------------------------------------------------------------------------- */

/* The model's trunk with the head given. */
static rlhf_model *scorer_new(rlhf_model *m, const json_t *head) {
    rlhf_model *s = ckpt_clone(m, RLHF_HEAD_SCORE);
    for (int i = 0; i < s->c.d; i++) model_w(s, P_SCORE, 0)[i] = (float)element(head, i);
    s->score_trained = 1;
    s->version++;
    return s;
}

static void rm_check_rewards(const golden *g, rlhf_trainer *t, int after) {
    float chosen[8], rejected[8];
    int n = t->train->n;
    arena_reset(&t->ws);
    float *score = rm_score_pairs(t->model, &t->ws, t->train);
    for (int i = 0; i < n; i++) {
        chosen[i] = score[2 * i];
        rejected[i] = score[2 * i + 1];
    }
    double tol = after ? number(g->j, "after_tol") : value_tol;
    check_list(g->j, after ? "chosen_rewards_after" : "chosen_rewards", chosen, n, tol);
    check_list(g->j, after ? "rejected_rewards_after" : "rejected_rewards", rejected, n, tol);
}

static void rm_gradients(const golden *g, rlhf_trainer *t) {
    const data_record *rec[3];
    int n = t->train->n;
    double pairwise = 0;
    for (int i = 0; i < n; i++) {
        rec[i] = t->train->record + i;
        double diff = element(member(g->j, "chosen_rewards"), i) -
                      element(member(g->j, "rejected_rewards"), i);
        pairwise += rec[i]->weight * rm_loss(diff - rec[i]->margin) / n;
    }
    CHECK_NEAR(pairwise, number(g->j, "pairwise_loss"), 1e-8);
    rm_sums sums = {0};
    opt_attach(t->opt);
    opt_zero(t->opt);
    for (int i = 0; i < n; i += g->batch)
        rm_pass(t, rec + i, i, base_min(g->batch, n - i), n, &sums);
    CHECK_NEAR(sums.loss / n, number(g->j, "loss"), value_tol);
    CHECK_NEAR(sums.correct / n, number(g->j, "accuracy"), 1e-8);
    CHECK_NEAR(sums.margin / n, number(g->j, "margin_mean"), value_tol);
    check_relative("gradient norm", opt_norm(t->opt), number(g->j, "grad_norm"), norm_tol);
    join(t->opt, 0);
    check_tensors(t->model, t->model->g, member(g->j, "grads"), GRADIENT);
}

static void rm_run(rlhf_ctx *ctx, void *arg) {
    const golden *g = arg;
    const json_t *pairs = member(g->j, "pairs");
    int n = (int)json_array_size(pairs);
    rlhf_dataset *d = dataset_new(ctx, RLHF_DATA_PREFERENCE, n);
    for (int i = 0; i < n; i++) {
        const json_t *p = json_array_get(pairs, (size_t)i);
        d->record[i].a = seq_new(d, member(p, "chosen"), 0);
        d->record[i].b = seq_new(d, member(p, "rejected"), 0);
        d->record[i].weight = number(p, "weight");
        d->record[i].margin = number(p, "margin");
    }
    rlhf_rm_config c = rlhf_rm_config_default();
    train_config common;
    memcpy(&common, &c, sizeof common);
    common_config(g->j, g->batch, &common);
    memcpy(&c, &common, sizeof common);
    c.gradient_accumulation_steps = (n + g->batch - 1) / g->batch;
    c.center_rewards_coefficient = number(g->j, "center_coef");
    rlhf_model *m = scorer_new(g->m, member(g->j, "score_weight"));
    rlhf_trainer *t = rm_open(m, NULL, NULL, d, NULL, &c);
    rm_check_rewards(g, t, 0);
    rm_gradients(g, t);
    float *before = weights_copy(m);
    CHECK_EQ_I(rlhf_trainer_step(t), RLHF_OK);
    CHECK_NEAR(rlhf_trainer_metric(t, "loss"), number(g->j, "loss"), value_tol);
    CHECK_NEAR(rlhf_trainer_metric(t, "accuracy"), number(g->j, "accuracy"), 1e-8);
    check_relative("grad_norm", rlhf_trainer_metric(t, "grad_norm"), number(g->j, "grad_norm"),
                   norm_tol);
    check_update(m, before, member(g->j, "update"));
    rm_check_rewards(g, t, 1);
    free(before);
    train_free(t);
    model_free(m);
    data_free(d);
}

TEST(reward_model) { for_each_family("rm", 3, rm_run); }

/* ---- PPO ------------------------------------------------------------------------------------- */

static const json_t *ppo_golden_row(const golden *g, int i) {
    return json_array_get(member(g->j, "rows"), (size_t)i);
}

/* The reward function: what the golden file says about the row. */
static rlhf_status ppo_given_score(void *user, const rlhf_sample *samples, int n, float *reward) {
    for (int i = 0; i < n; i++)
        reward[i] = (float)number(ppo_golden_row(user, samples[i].prompt_index), "score");
    return RLHF_OK;
}

/* Log-probabilities of the answers under the policy as it is now, and the states behind them. */
static void ppo_policy_logp(rlhf_trainer *t, roll_row *const *row, int n) {
    arena *ws = &t->ws;
    model_run run = ppo_batch(ws, row, n);
    int total, *state = ppo_states(ws, &run, row, n, 0, &total);
    int32_t *target = ppo_targets(ws, row, n, total);
    model_forward(t->model, ws, &run);
    model_top top = model_top_fwd(t->model, ws, run.x, state, total);
    op_weight w = model_head_weight(t->model, total);
    op_env e = {t->ctx, ws};
    op_rows out = {.logp = arena_floats(ws, (size_t)total, 1)};
    op_vocab_run(&e, &w, total, top.h, target, 1.0f / (float)t->u.ppo.temperature, &out, NULL, NULL,
                 NULL);
    size_t d = (size_t)t->model->c.d;
    for (int i = 0, at = 0; i < n; at += row[i++]->n) {
        memcpy(row[i]->logp, out.logp + at, (size_t)row[i]->n * sizeof(float));
        memcpy(row[i]->hidden, top.h + (size_t)at * d, (size_t)row[i]->n * d * sizeof(float));
    }
}

/* The rollout that the golden file gives in place of sampling. */
static void ppo_given_rows(const golden *g, rlhf_trainer *t, roll_row *rows, roll_row **row) {
    for (int i = 0; i < t->train->n; i++) {
        const json_t *answer = member(ppo_golden_row(g, i), "response");
        roll_row *r = rows + i;
        row[i] = r;
        CHECK_EQ_I(r->index, i);
        r->n = r->n_value = (int)json_array_size(answer);
        for (int k = 0; k < r->n; k++) r->ids[r->n_prompt + k] = (int32_t)element(answer, k);
        r->finished = model_is_eos(t->model, r->ids[r->n_prompt + r->n - 1]);
    }
}

static void ppo_check_rollout(const golden *g, rlhf_trainer *t, roll_row *const *row, int n) {
    for (int i = 0; i < n; i++) {
        const json_t *want = ppo_golden_row(g, i);
        const roll_row *r = row[i];
        check_list(want, "logprobs", r->logp, r->n, value_tol);
        check_list(want, "ref_logprobs", r->ref_logp, r->n, value_tol);
        check_list(want, "exact_kl", r->kl, r->n, value_tol);
        check_list(want, "entropy", r->entropy, r->n, value_tol);
        check_list(want, "values", r->value, r->n, value_tol);
        CHECK_NEAR(r->score, number(want, "score_final"), 1e-6);
    }
    /* Advantages as they are, then whitened. */
    t->u.ppo.whiten_advantages = 0;
    ppo_advantages(t, row, n);
    for (int i = 0; i < n; i++) {
        const json_t *want = ppo_golden_row(g, i);
        check_list(want, "rewards", row[i]->reward, row[i]->n, value_tol);
        check_list(want, "advantages_raw", row[i]->adv, row[i]->n, 5 * value_tol);
        check_list(want, "returns", row[i]->ret, row[i]->n, 5 * value_tol);
    }
    t->u.ppo.whiten_advantages = 1;
    ppo_advantages(t, row, n);
    for (int i = 0; i < n; i++)
        check_list(ppo_golden_row(g, i), "advantages", row[i]->adv, row[i]->n, 1e-4);
}

static void ppo_check_objective(const golden *g, rlhf_trainer *t, roll_row *const *row, int n) {
    const json_t *want = member(g->j, "objective");
    ppo_rollout_metrics(t, row, n);
    double tokens = number(want, "tokens");
    const struct {
        const char *metric, *key;
        double scale; /* golden means over tokens are sums over an answer here */
    } pair[] = {{"objective/kl", "kl", 1},
                {"objective/kl_k1", "kl_k1_token", tokens / n},
                {"objective/kl_k3", "kl_k3_token", tokens / n},
                {"objective/kl_exact", "kl_exact_token", tokens / n},
                {"objective/entropy", "entropy", 1},
                {"objective/scores", "scores", 1},
                {"objective/non_score_reward", "non_score_reward", 1},
                {"objective/rlhf_reward", "rlhf_reward", 1}};
    for (size_t i = 0; i < sizeof pair / sizeof *pair; i++) {
        double got = rlhf_trainer_metric(t, pair[i].metric);
        double expected = number(want, pair[i].key) * pair[i].scale;
        if (!(fabs(got - expected) <= 1e-4))
            test_fail(__FILE__, __LINE__, "%s is %.9g, expected %.9g", pair[i].metric, got,
                      expected);
    }
    CHECK_EQ_I(rlhf_trainer_metric(t, "val/num_eos_tokens"), number(want, "num_eos"));
    CHECK_NEAR(rlhf_trainer_metric(t, "completions/mean_length"), tokens / n, 0);
}

static rlhf_ppo_config ppo_config(const golden *g) {
    rlhf_ppo_config c = rlhf_ppo_config_default();
    train_config common;
    memcpy(&common, &c, sizeof common);
    common_config(g->j, g->batch, &common);
    memcpy(&c, &common, sizeof common);
    c.batch_size = count(g->j, "rows");
    c.num_ppo_epochs = (int64_t)number(g->j, "epochs");
    c.num_mini_batches = count(g->j, "minibatches");
    c.response_length = 6;
    c.temperature = number(g->j, "temperature");
    c.missing_eos_penalty = number(g->j, "missing_eos_penalty");
    c.kl_coef = number(g->j, "kl_coef");
    c.gamma = number(g->j, "gamma");
    c.lam = number(g->j, "lam");
    c.cliprange = number(g->j, "cliprange");
    c.cliprange_value = number(g->j, "cliprange_value");
    c.vf_coef = number(g->j, "vf_coef");
    c.shuffle_minibatches = 0;
    return c;
}

/* A trainer whose reference and value model are those of the golden file. */
static rlhf_trainer *ppo_trainer(const golden *g, rlhf_dataset *d, const rlhf_ppo_config *c) {
    rlhf_trainer *t = ppo_open(g->m, NULL, d, NULL, ppo_given_score, (void *)(uintptr_t)g, c);
    double scale = number(g->j, "ref_scale");
    model_thaw(t->start);
    for (size_t i = 0; i < t->start->n; i++)
        t->start->w[i] = (float)(scale * (double)t->start->w[i]);
    t->start->version++;
    for (int i = 0; i < t->value->c.d; i++)
        model_w(t->value, P_SCORE, 0)[i] = (float)element(member(g->j, "value_head"), i);
    t->value->version++;
    return t;
}

/* Both losses' gradients of n rows with so many tokens, as many rows at once as the case says. */
static void ppo_add_gradients(const golden *g, rlhf_trainer *t, roll_row *const *row, int n,
                              int tokens) {
    ppo_policy p = {.clip = t->u.ppo.cliprange, .scale = 1.0 / tokens};
    ppo_value v = {.range = t->u.ppo.cliprange_value, .scale = t->u.ppo.vf_coef / tokens};
    opt_attach(t->opt);
    opt_zero(t->opt);
    for (int i = 0; i < n; i += g->batch) {
        int k = base_min(g->batch, n - i), shared = t->u.ppo.shared_trunk;
        ppo_pass(t, t->model, row + i, k, &p, shared ? &v : NULL);
        if (!shared) ppo_pass(t, t->value, row + i, k, NULL, &v);
    }
    join(t->opt, 1);
    join(t->opt, 0);
}

/* A trunk that both models share has the sum of their gradients, which the file has apart, since
 * the value model began as a copy of the policy; the head has its own. */
static void ppo_shared_gradients(const golden *g, rlhf_trainer *apart, rlhf_dataset *d,
                                 roll_row *const *row) {
    int n = count(json_array_get(member(g->j, "minibatch"), 0), "rows"), tokens = 0;
    rlhf_ppo_config c = ppo_config(g);
    c.shared_trunk = 1;
    for (int i = 0; i < n; i++) tokens += row[i]->n;
    /* Another policy, since a model lends its gradients to one trainer. */
    golden other = *g;
    other.m = ckpt_clone(g->m, RLHF_HEAD_LM);
    rlhf_trainer *t = ppo_trainer(&other, d, &c);
    CHECK_EQ_I(t->value->n, base_round_up((size_t)t->value->c.d, RLHF_LANES));
    ppo_values(t, row, n); /* from the states of sampling */
    for (int i = 0; i < n; i++)
        check_list(ppo_golden_row(g, i), "values", row[i]->value, row[i]->n, value_tol);
    ppo_add_gradients(g, t, row, n, tokens);
    double off = 0, size = 0;
    for (int p = 0; p < P_COUNT; p++)
        for (int l = 0; l < model_own_layers(t->model, p); l++)
            for (size_t i = 0; i < t->model->slot[p].n; i++) {
                double want = (double)model_g(apart->model, p, l)[i];
                if (model_g(apart->value, p, l)) want += (double)model_g(apart->value, p, l)[i];
                double x = (double)model_g(t->model, p, l)[i] - want;
                off += x * x;
                size += want * want;
            }
    CHECK(size > 0 && sqrt(off / size) < 1e-6);
    for (int i = 0; i < t->value->c.d; i++)
        CHECK_NEAR(model_g(t->value, P_SCORE, 0)[i], model_g(apart->value, P_SCORE, 0)[i], 1e-6);
    train_free(t);
    model_free(other.m);
}

/* The gradients of the first minibatch. */
static void ppo_gradients(const golden *g, rlhf_trainer *t, roll_row *const *row) {
    const json_t *want = json_array_get(member(g->j, "minibatch"), 0);
    int n = count(want, "rows"), tokens = 0;
    for (int i = 0; i < n; i++) tokens += row[i]->n;
    CHECK_EQ_I(tokens, number(want, "tokens"));
    ppo_add_gradients(g, t, row, n, tokens);
    check_relative("policy's gradient norm", sqrt(gradient_square(t->model)),
                   number(want, "grad_norm_policy"), norm_tol);
    check_relative("value's gradient norm", sqrt(gradient_square(t->value)),
                   number(want, "grad_norm_value"), norm_tol);
    check_tensors(t->model, t->model->g, member(want, "policy_grads"), GRADIENT);
    check_tensors(t->value, t->value->g, member(want, "value_grads"), GRADIENT);
}

/* Both minibatches, one optimizer step each. */
static void ppo_minibatches(const golden *g, rlhf_trainer *t, roll_row *const *row) {
    double lr[2] = {t->u.ppo.learning_rate, t->u.ppo.learning_rate};
    for (int b = 0, at = 0; b < count(g->j, "minibatch"); b++) {
        const json_t *want = json_array_get(member(g->j, "minibatch"), (size_t)b);
        double tol = b ? number(g->j, "after_tol") : value_tol;
        int n = count(want, "rows");
        ppo_sums s = {0};
        ppo_minibatch(t, row + at, n, lr, &s);
        CHECK_NEAR(s.policy, number(want, "pg"), tol);
        CHECK_NEAR(s.value, number(want, "vf"), tol);
        CHECK_NEAR(s.policy + t->u.ppo.vf_coef * s.value, number(want, "loss"), tol);
        CHECK_NEAR(s.kl, number(want, "approxkl"), b ? tol : 0);
        CHECK_NEAR(s.clipped, number(want, "clipfrac"), 1e-8);
        CHECK_NEAR(s.value_clipped, number(want, "vf_clipfrac"), 1e-8);
        CHECK_NEAR(s.ratio, number(want, "ratio_mean"), b ? tol : 0);
        CHECK_NEAR(s.entropy, number(want, "entropy"), tol);
        check_relative("grad_norm", s.norm, number(want, "grad_norm"), b ? 1e-3 : norm_tol);
        at += n;
    }
}

static void ppo_check_after(const golden *g, rlhf_trainer *t, roll_row *const *row, int n) {
    double tol = number(g->j, "after_tol");
    ppo_policy_logp(t, row, n);
    ppo_values(t, row, n);
    for (int i = 0; i < n; i++) {
        check_list(ppo_golden_row(g, i), "logprobs_after", row[i]->logp, row[i]->n, tol);
        check_list(ppo_golden_row(g, i), "values_after", row[i]->value, row[i]->n, tol);
    }
}

static void ppo_run(rlhf_ctx *ctx, void *arg) {
    const golden *g = arg;
    int n = count(g->j, "rows");
    rlhf_dataset *d = dataset_new(ctx, RLHF_DATA_PROMPT, n);
    for (int i = 0; i < n; i++)
        d->record[i].a = seq_new(d, member(ppo_golden_row(g, i), "prompt"), 0);
    rlhf_ppo_config c = ppo_config(g);
    rlhf_trainer *t = ppo_trainer(g, d, &c);
    float *policy = weights_copy(t->model), *value = weights_copy(t->value);
    roll_row *rows = ppo_rows_new(t), *row[4];
    ppo_given_rows(g, t, rows, row);
    ppo_policy_logp(t, row, n);
    ppo_each_batch(t, row, n, ppo_reference);
    ppo_each_batch(t, row, n, ppo_values);
    ppo_score(t, row, n);
    ppo_check_rollout(g, t, row, n);
    ppo_check_objective(g, t, row, n);
    ppo_gradients(g, t, row);
    ppo_shared_gradients(g, t, d, row);

    ppo_minibatches(g, t, row);
    check_update(t->model, policy, member(g->j, "policy_update"));
    check_update(t->value, value, member(g->j, "value_update"));
    uint64_t hash[2] = {model_hash(t->model), model_hash(t->value)};

    /* Once more from the start, the way a trainer's step does it: the same bits. */
    memcpy(t->model->w, policy, t->model->n * sizeof *policy);
    memcpy(t->value->w, value, t->value->n * sizeof *value);
    for (int i = 0; i < 2; i++) {
        memset(t->opt->m[i], 0, t->opt->model[i]->n * sizeof(float));
        memset(t->opt->v[i], 0, t->opt->model[i]->n * sizeof(float));
        t->opt->model[i]->version++;
    }
    t->opt->step = 0;
    double lr[2] = {t->u.ppo.learning_rate, t->u.ppo.learning_rate};
    ppo_optimize(t, row, n, lr);
    CHECK_EQ_I(t->opt->step, 2);
    CHECK(model_hash(t->model) == hash[0] && model_hash(t->value) == hash[1]);
    CHECK_NEAR(rlhf_trainer_metric(t, "val/ratio_first"), 1, 0);
    ppo_check_after(g, t, row, n);
    free(policy);
    free(value);
    train_free(t);
    data_free(d);
}

TEST(ppo) { for_each_family("ppo", 2, ppo_run); }

TEST_MAIN(CASE(logits), CASE(further_families), CASE(sft), CASE(reward_model), CASE(ppo))
