/* The three trainers through the public functions, on tiny models: what a step may change and what
 * it must not, how batches may be cut, stopping and going on, numbers that are not finite, reward
 * functions that fail, and that each stage learns what it is for. */

#include "../rlhf.c"
#include "test.h"

/* ---- models and data ------------------------------------------------------------------------- */

static const char gpt2_tied[] =
    "{\"model_type\":\"gpt2\",\"vocab_size\":61,\"n_embd\":24,\"n_layer\":2,\"n_head\":2,"
    "\"n_positions\":40,\"eos_token_id\":2,\"initializer_range\":0.2}";
static const char llama_untied[] =
    "{\"model_type\":\"llama\",\"vocab_size\":53,\"hidden_size\":24,\"num_hidden_layers\":2,"
    "\"num_attention_heads\":4,\"num_key_value_heads\":2,\"intermediate_size\":40,"
    "\"max_position_embeddings\":40,\"eos_token_id\":2,\"initializer_range\":0.2}";
static const char *const configs[] = {gpt2_tied, llama_untied};
enum { VOCAB = 53 }; /* of the smaller one */

static rlhf_model *model_make(rlhf_ctx *ctx, const char *config) {
    rlhf_model *m = NULL;
    CHECK_EQ_I(rlhf_model_init(ctx, test_write("config.json", config), 0, -1, -1, 7, &m), RLHF_OK);
    return m;
}

static rlhf_model *scorer_of(rlhf_model *lm) {
    rlhf_model *m = NULL;
    CHECK_EQ_I(rlhf_model_clone(lm, RLHF_HEAD_SCORE, &m), RLHF_OK);
    return m;
}

static uint64_t hash_of(rlhf_model *m) { return model_hash(m); }

/* What a hand-made dataset holds: ragged sequences of random tokens. */
typedef enum data_rule { RANDOM, HAS_SEVEN, COIN } data_rule;

typedef struct data_spec {
    rlhf_data_kind kind;
    int n;
    uint64_t key; /* other keys give other records */
    data_rule rule;
    rlhf_dataset *d;
} data_spec;

static data_seq seq_new(rlhf_dataset *d, uint64_t key, int n, int loss_from, int end) {
    data_seq s = {.n = n + end};
    s.ids = arena_alloc(&d->store, (size_t)s.n * sizeof *s.ids);
    s.loss = arena_alloc(&d->store, (size_t)s.n);
    for (int i = 0; i < s.n; i++) {
        s.ids[i] = i < n ? 8 + (int32_t)(rng_u64(1, key, (uint64_t)i) % (VOCAB - 8)) : 2;
        s.loss[i] = i >= loss_from;
    }
    return s;
}

static void record_new(rlhf_dataset *d, const data_spec *spec, int i) {
    uint64_t key = spec->key * 100000 + 2 * (uint64_t)i;
    int prompt = spec->kind == RLHF_DATA_PROMPT;
    data_record *r = d->record + i;
    *r = (data_record){.line = "{}", .prompt = "", .weight = 1};
    int len = 3 + (int)(rng_u64(2, key, 0) % 12);
    r->a = seq_new(d, key, prompt ? 1 + i % 5 : len, 1 + i % 3, !prompt);
    if (spec->kind != RLHF_DATA_PREFERENCE) return;
    r->b = seq_new(d, key + 1, 3 + (int)(rng_u64(2, key, 1) % 12), 1, 1);
    if (spec->rule == RANDOM) return;
    r->a.ids[rng_u64(2, key, 2) % (uint64_t)(r->a.n - 1)] = 7;
    if (spec->rule == COIN && rng_u64(2, key, 3) % 2) {
        data_seq other = r->a;
        r->a = r->b;
        r->b = other;
    }
}

static void data_new(rlhf_ctx *ctx, void *arg) {
    data_spec *spec = arg;
    rlhf_dataset *d = mem_zalloc(ctx, 1, sizeof *d);
    d->ctx = d->store.ctx = ctx;
    d->config = rlhf_data_config_default(spec->kind);
    d->record = arena_alloc(&d->store, (size_t)spec->n * sizeof *d->record);
    for (d->n = 0; d->n < spec->n; d->n++) record_new(d, spec, d->n);
    spec->d = d;
}

static rlhf_dataset *data_make(rlhf_ctx *ctx, rlhf_data_kind kind, int n, uint64_t key,
                               data_rule rule) {
    data_spec spec = {kind, n, key, rule, NULL};
    CHECK_EQ_I(test_call(ctx, data_new, &spec), RLHF_OK);
    return spec.d;
}

/* ---- runs ------------------------------------------------------------------------------------ */

typedef enum stage { SFT, RM, PPO } stage;
static const rlhf_data_kind stage_data[] = {RLHF_DATA_SFT, RLHF_DATA_PREFERENCE, RLHF_DATA_PROMPT};

/* Any configuration; all begin with the common fields. */
typedef union config {
    train_config c;
    rlhf_sft_config sft;
    rlhf_rm_config rm;
    rlhf_ppo_config ppo;
} config;

/* Rewards an answer by its tokens; can be told to fail in the call after `fail_after` others. */
typedef struct judge {
    int calls, fail_after; /* -1: never */
    rlhf_status status;
    float factor, every; /* every: what all answers get instead, unless 0 */
} judge;

static rlhf_status judge_fn(void *user, const rlhf_sample *s, int n, float *reward) {
    judge *j = user;
    if (j->fail_after >= 0 && j->calls++ >= j->fail_after) return j->status;
    for (int i = 0; i < n; i++) {
        int small = 0;
        for (int k = 0; k < s[i].n_completion; k++) small += s[i].completion_ids[k] < VOCAB / 2;
        reward[i] = j->every != 0 ? j->every : j->factor * (float)small / (float)s[i].n_completion;
    }
    return RLHF_OK;
}

/* One run with all that belongs to it. */
typedef struct lab {
    stage stage;
    const char *model; /* its config.json */
    rlhf_ctx *ctx;
    rlhf_model *lm, *m; /* m: what is trained */
    rlhf_dataset *train, *eval;
    config config;
    judge judge;
    rlhf_trainer *t;
} lab;

static config config_default(stage s) {
    config c;
    if (s == SFT) c.sft = rlhf_sft_config_default();
    else if (s == RM) c.rm = rlhf_rm_config_default();
    else c.ppo = rlhf_ppo_config_default();
    c.c.learning_rate = 3e-3;
    c.c.logging_steps = 1;
    c.c.per_device_train_batch_size = 4;
    if (s == RM) {
        c.rm.normalize_samples = 20;
        c.rm.response_length = 8;
    }
    if (s == PPO) {
        c.ppo.batch_size = 8;
        c.ppo.response_length = 6;
        c.ppo.num_ppo_epochs = 2;
        c.ppo.num_mini_batches = 2;
    }
    return c;
}

/* Context, model and data of a run whose stage, model and config are set. */
static void lab_prepare(lab *l, const rlhf_hooks *hooks) {
    rlhf_options o = rlhf_options_default();
    o.threads = 1;
    o.hooks = hooks ? *hooks : test_hooks();
    CHECK_EQ_I(rlhf_open(&l->ctx, &o), RLHF_OK);
    l->lm = model_make(l->ctx, l->model);
    l->m = l->stage == RM ? scorer_of(l->lm) : l->lm;
    l->train = data_make(l->ctx, stage_data[l->stage], 24, 1, HAS_SEVEN);
    if (l->stage != PPO)
        l->eval = data_make(l->ctx, stage_data[l->stage], 10, 2, HAS_SEVEN);
    l->judge.fail_after = -1;
    l->judge.factor = 1;
}

static rlhf_status lab_open(lab *l) {
    if (l->stage == SFT)
        return rlhf_sft_open(l->m, NULL, l->train, l->eval, &l->config.sft, &l->t);
    if (l->stage == RM)
        return rlhf_rm_open(l->m, l->lm, NULL, l->train, l->eval, &l->config.rm, &l->t);
    return rlhf_ppo_open(l->m, NULL, l->train, NULL, judge_fn, &l->judge, &l->config.ppo, &l->t);
}

static void lab_start(lab *l) {
    lab_prepare(l, NULL);
    CHECK_EQ_I(lab_open(l), RLHF_OK);
}

static void lab_step(lab *l, int steps) {
    for (int i = 0; i < steps; i++)
        if (rlhf_trainer_step(l->t) != RLHF_OK)
            test_fail(__FILE__, __LINE__, "step %d: %s", i, rlhf_error(l->ctx));
}

static double metric(const lab *l, const char *name) { return rlhf_trainer_metric(l->t, name); }

static void lab_close(lab *l) {
    rlhf_trainer_close(l->t);
    rlhf_dataset_close(l->train);
    rlhf_dataset_close(l->eval);
    if (l->m != l->lm) rlhf_model_close(l->m);
    rlhf_model_close(l->lm);
    rlhf_close(l->ctx);
}

/* Calls run for each stage and family. */
static void for_each(void (*run)(lab *)) {
    for (int s = SFT; s <= PPO; s++)
        for (int f = 0; f < 2; f++) {
            int failed = test_failures;
            lab l = {.stage = (stage)s, .model = configs[f], .config = config_default((stage)s)};
            run(&l);
            if (test_failures > failed) printf("\n    (stage %d, family %d)", s, f);
        }
}

/* ---- what a step changes --------------------------------------------------------------------- */

static void no_learning_rate(lab *l) {
    l->config.c.learning_rate = 0;
    l->config.c.weight_decay = 0.1;
    lab_start(l);
    uint64_t before = hash_of(l->m), value = l->stage == PPO ? hash_of(l->t->value) : 0;
    lab_step(l, 2);
    CHECK(hash_of(l->m) == before);
    if (l->stage == PPO) {
        CHECK(hash_of(l->t->value) == value);
        CHECK_NEAR(metric(l, "objective/kl"), 0, 0);
        CHECK_NEAR(metric(l, "objective/kl_exact"), 0, 0);
        CHECK_NEAR(metric(l, "val/ratio"), 1, 0);
        CHECK_NEAR(metric(l, "val/ratio_var"), 0, 0);
        CHECK_NEAR(metric(l, "objective/non_score_reward"), 0, 0);
    } else {
        CHECK(metric(l, "grad_norm") > 0);
    }
    lab_close(l);
}

TEST(no_learning_rate_no_change) { for_each(no_learning_rate); }

static void counts(lab *l) {
    l->config.c.num_train_epochs = 2;
    l->config.c.gradient_accumulation_steps = 2;
    lab_start(l);
    CHECK_EQ_I(rlhf_trainer_steps_total(l->t), 6); /* 24 records, 8 at a time */
    uint64_t before = hash_of(l->m);
    for (int i = 1; i <= 6; i++) {
        lab_step(l, 1);
        CHECK_EQ_I(rlhf_trainer_steps_done(l->t), i);
        CHECK_EQ_I(l->t->opt->step, l->stage == PPO ? 4 * i : i);
    }
    CHECK(hash_of(l->m) != before);
    CHECK_EQ_I(rlhf_trainer_step(l->t), RLHF_ERR_ARG);
    CHECK_EQ_I(rlhf_trainer_steps_done(l->t), 6);
    CHECK_NEAR(metric(l, "epoch"), 2, 0);
    lab_close(l);
}

TEST(optimizer_steps) { for_each(counts); }

/* ---- panels ---------------------------------------------------------------------------------- */

static uint64_t panels_run(stage s, const char *model, int lend) {
    lab l = {.stage = s, .model = model, .config = config_default(s)};
    lab_start(&l);
    for (int i = 0; i < 3; i++) {
        lab_step(&l, 1);
        CHECK(l.m->room == NULL);
        if (!lend) continue;
        /* What samples between steps leaves its panels in the gradients. */
        int32_t ids[3] = {1, 2, 3}, out[2];
        gen_item item = {.prompt = ids, .n_prompt = 3, .out = out};
        gen_config g = {.max_new = 2, .batch = 1, .temperature = 1, .top_p = 1, .stop = -1};
        opt_lend(l.t->opt);
        if (s != RM) gen_run(l.m, &l.m->ws, &g, &item, 1, NULL);
        const float *room = l.m->room, *own = l.t->opt->g[0];
        if (s != RM) CHECK(room >= own && room < own + l.m->n && l.m->room_used > 0);
    }
    uint64_t hash = hash_of(l.m);
    /* Panels go with the gradients that they lie in. */
    rlhf_trainer_close(l.t);
    l.t = NULL;
    CHECK(l.m->room == NULL && l.m->room_used == 0);
    lab_close(&l);
    return hash;
}

/* Gradients that lend their memory between steps are zero when the next one begins. */
TEST(lent_gradients) {
    for (int s = SFT; s <= PPO; s++)
        for (int f = 0; f < 2; f++)
            CHECK(panels_run((stage)s, configs[f], 1) == panels_run((stage)s, configs[f], 0));
}

/* ---- how batches are cut --------------------------------------------------------------------- */

/* What two steps end in, the window being cut into `per` records at a time. */
typedef struct outcome {
    uint64_t hash, value;
    double loss, grad_norm;
    int64_t steps;
} outcome;

static outcome cut(stage s, const char *model, int per, int times) {
    lab l = {.stage = s, .model = model, .config = config_default(s)};
    l.config.c.per_device_train_batch_size = per;
    if (s != PPO) l.config.c.gradient_accumulation_steps = times;
    lab_start(&l);
    lab_step(&l, 1);
    outcome o = {.loss = metric(&l, s == PPO ? "loss/policy_avg" : "loss"),
                 .grad_norm = metric(&l, "grad_norm")};
    lab_step(&l, 1);
    o.hash = hash_of(l.m);
    o.value = s == PPO ? hash_of(l.t->value) : 0;
    o.steps = l.t->opt->step;
    lab_close(&l);
    return o;
}

static void any_cut(stage s) {
    for (int f = 0; f < 2; f++) {
        outcome whole = cut(s, configs[f], 12, 1);
        for (int per = 1; per <= 6; per += per < 4 ? 1 : 2) {
            outcome o = cut(s, configs[f], per, 12 / per);
            CHECK_EQ_I(o.steps, whole.steps);
            CHECK_NEAR(o.loss, whole.loss, 0);
            CHECK_NEAR(o.grad_norm, whole.grad_norm, 0);
            CHECK(o.hash == whole.hash && o.value == whole.value);
        }
    }
}

TEST(sft_micro_batches) { any_cut(SFT); }
TEST(rm_micro_batches) { any_cut(RM); }
TEST(ppo_micro_batches) { any_cut(PPO); }

/* The loss is the mean over the tokens of the window, not over its batches or sequences. */
TEST(sft_tokens_weigh_the_same) {
    lab l = {.stage = SFT, .model = llama_untied, .config = config_default(SFT)};
    l.config.c.per_device_train_batch_size = 1;
    l.config.c.gradient_accumulation_steps = 24;
    lab_start(&l);
    double nll = 0, by_sequence = 0;
    int labels = 0;
    for (int i = 0; i < l.train->n; i++) {
        const data_seq *s = &l.train->record[i].a;
        float logp[64];
        double sum = 0;
        int n = 0;
        CHECK_EQ_I(rlhf_model_logprobs(l.m, s->ids, s->n, logp), RLHF_OK);
        for (int t = 1; t < s->n; t++)
            if (s->loss[t]) {
                sum -= (double)logp[t - 1];
                n++;
            }
        nll += sum;
        labels += n;
        by_sequence += sum / n / l.train->n;
    }
    lab_step(&l, 1);
    CHECK_NEAR(metric(&l, "loss"), nll / labels, 1e-6);
    CHECK(fabs(by_sequence - nll / labels) > 1e-3);
    CHECK_EQ_I(metric(&l, "num_tokens"), l.t->tokens);
    lab_close(&l);
}

/* ---- PPO's ratios ---------------------------------------------------------------------------- */

TEST(ratio_is_one) {
    static const double temperatures[] = {0.7, 1, 1.3};
    for (int f = 0; f < 2; f++)
        for (int k = 0; k < 3; k++) {
            lab l = {.stage = PPO, .model = configs[f], .config = config_default(PPO)};
            l.config.ppo.temperature = temperatures[k];
            l.config.ppo.per_device_train_batch_size = 3;
            l.config.ppo.num_ppo_epochs = l.config.ppo.num_mini_batches = 1;
            l.config.c.learning_rate = 1e-2;
            lab_start(&l);
            for (int i = 0; i < 3; i++) {
                lab_step(&l, 1);
                CHECK_NEAR(metric(&l, "val/ratio_first"), 1, 0);
                CHECK_NEAR(metric(&l, "val/ratio"), 1, 0);
                CHECK_NEAR(metric(&l, "policy/approxkl_avg"), 0, 0);
                CHECK_NEAR(metric(&l, "policy/clipfrac_avg"), 0, 0);
            }
            CHECK(fabs(metric(&l, "objective/kl_exact")) > 1e-4); /* it did move */
            lab_close(&l);
        }
}

TEST(ratio_leaves_one) {
    lab l = {.stage = PPO, .model = llama_untied, .config = config_default(PPO)};
    lab_start(&l);
    lab_step(&l, 1);
    CHECK_NEAR(metric(&l, "val/ratio_first"), 1, 0);
    CHECK(metric(&l, "policy/approxkl_avg") > 0);
    CHECK(metric(&l, "val/ratio_var") > 0);
    lab_close(&l);
}

/* ---- stopping and going on ------------------------------------------------------------------- */

enum { RUN_STEPS = 6 };

static int stop_at(void *user, const rlhf_progress *p) {
    const int64_t *step = user;
    return strcmp(p->what, "generate") != 0 && p->done == *step;
}

/* A run of RUN_STEPS in dir that the hook stops after `stop` steps (0: never), all of it new as in
 * a new process. Saves after every `save` steps. */
typedef struct trip {
    const char *dir;
    int stop, save, resume, fail_after, logging;
    int64_t fail_alloc; /* this allocation of the run fails, unless 0 */
    int shared;         /* ppo: one trunk */
} trip;

static rlhf_status travel(stage s, const char *model, const trip *way) {
    int64_t stop = way->stop;
    rlhf_hooks hooks = test_hooks();
    hooks.user = &stop;
    hooks.progress = stop_at;
    lab l = {.stage = s, .model = model, .config = config_default(s)};
    char dir[512];
    snprintf(dir, sizeof dir, "%s", test_path(way->dir));
    l.config.c.output_dir = dir;
    l.config.c.max_steps = RUN_STEPS;
    l.config.c.save_steps = way->save;
    l.config.c.eval_steps = 2;
    l.config.c.logging_steps = way->logging;
    l.config.c.resume = way->resume;
    l.config.c.warmup_steps = 2;
    if (s == PPO) l.config.ppo.kl_target = 0.5, l.config.ppo.kl_horizon = 50;
    if (s == PPO) l.config.ppo.shared_trunk = way->shared;
    lab_prepare(&l, &hooks);
    l.judge.fail_after = way->fail_after;
    l.judge.status = RLHF_ERR_IO;
    rlhf_status status = lab_open(&l);
    if (way->fail_alloc) test_fail_at(way->fail_alloc);
    if (status == RLHF_OK) status = rlhf_trainer_run(l.t);
    test_fail_at(0);
    int allowed = status == RLHF_OK || status == RLHF_STOPPED || status == RLHF_ERR_CALLBACK;
    if (!allowed && !(way->fail_alloc && status == RLHF_ERR_MEMORY))
        test_fail(__FILE__, __LINE__, "%s: %s", dir, rlhf_error(l.ctx));
    lab_close(&l);
    return status;
}

static char *contents(const char *dir, const char *name, size_t *size) {
    char path[600];
    snprintf(path, sizeof path, "%s/%s", test_path(dir), name);
    FILE *f = fopen(path, "rb");
    char *text = NULL;
    *size = 0;
    if (f && fseek(f, 0, SEEK_END) == 0) {
        *size = (size_t)ftell(f);
        text = calloc(*size + 1, 1);
        rewind(f);
        if (fread(text, 1, *size, f) != *size) *size = 0;
    }
    if (f) fclose(f);
    return text;
}

static void check_same_runs(const char *a, const char *b) {
    static const char *const files[] = {"model.safetensors", "config.json", "metrics.jsonl",
                                        "run.json"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        size_t n, k;
        char *x = contents(a, files[i], &n), *y = contents(b, files[i], &k);
        size_t at = 0;
        while (x && y && at < n && at < k && x[at] == y[at]) at++;
        if (!x || !y || n == 0) test_fail(__FILE__, __LINE__, "%s was not written", files[i]);
        else if (n != k || at < n) {
            /* run.json names the directory. */
            if (strcmp(files[i], "run.json") == 0) CHECK_EQ_I(n, k);
            else test_fail(__FILE__, __LINE__, "%s differs at byte %zu:\n%.200s\n%.200s", files[i],
                           at, x + (at > 100 ? at - 100 : 0), y + (at > 100 ? at - 100 : 0));
        }
        free(x);
        free(y);
    }
}

/* Stops between two evaluations, and right after one. */
static void stop_and_go(stage s, const char *model, int logging, int shared) {
    trip whole = {"a", .fail_after = -1, .logging = logging, .shared = shared};
    trip rest = whole;
    rest.dir = "b";
    rest.resume = 1;
    CHECK_EQ_I(travel(s, model, &whole), RLHF_OK);
    for (int stop = 2; stop <= 3; stop++) {
        trip first = whole;
        first.dir = "b";
        first.stop = stop;
        CHECK_EQ_I(travel(s, model, &first), RLHF_STOPPED);
        CHECK_EQ_I(travel(s, model, &rest), RLHF_OK);
        check_same_runs("a", "b");
        test_remove(test_path("b"));
    }
    test_remove(test_path("a"));
}

TEST(sft_stop_and_resume) {
    stop_and_go(SFT, gpt2_tied, 1, 0);
    stop_and_go(SFT, llama_untied, 2, 0);
}

TEST(rm_stop_and_resume) {
    stop_and_go(RM, gpt2_tied, 2, 0);
    stop_and_go(RM, llama_untied, 1, 0);
}

TEST(ppo_stop_and_resume) {
    stop_and_go(PPO, gpt2_tied, 1, 0);
    stop_and_go(PPO, llama_untied, 2, 0);
    stop_and_go(PPO, gpt2_tied, 1, 1);
}

/* A run that ends amid things: the newest checkpoint counts, later lines of metrics are dropped. */
TEST(ppo_crash_and_resume) {
    trip whole = {"a", .save = 2, .fail_after = -1, .logging = 1};
    trip first = {"b", .save = 2, .fail_after = 3, .logging = 1};
    trip rest = {"b", .save = 2, .resume = 1, .fail_after = -1, .logging = 1};
    CHECK_EQ_I(travel(PPO, llama_untied, &whole), RLHF_OK);
    CHECK_EQ_I(travel(PPO, llama_untied, &first), RLHF_ERR_CALLBACK);
    CHECK_EQ_I(travel(PPO, llama_untied, &rest), RLHF_OK);
    check_same_runs("a", "b");
}

/* Wherever a run ends for lack of memory, in a step or while it writes its state: what is in the
 * directory fits together, and the run that goes on ends as one that had no such end. */
static void crash_anywhere(stage s) {
    trip whole = {"a", .save = 1, .fail_after = -1, .logging = 1};
    int64_t calls = atomic_load(&test_calls), tried = 0;
    CHECK_EQ_I(travel(s, llama_untied, &whole), RLHF_OK);
    calls = atomic_load(&test_calls) - calls;
    for (int64_t n = 1 + calls / 3; n < calls; n += 1 + calls / 16) {
        trip first = {"b", .save = 1, .fail_after = -1, .logging = 1, .fail_alloc = n};
        trip rest = {"b", .save = 1, .resume = 1, .fail_after = -1, .logging = 1};
        if (travel(s, llama_untied, &first) == RLHF_ERR_MEMORY) {
            CHECK_EQ_I(travel(s, llama_untied, &rest), RLHF_OK);
            check_same_runs("a", "b");
            tried++;
        }
        test_remove(test_path("b"));
    }
    CHECK(tried > 5);
}

TEST(crash_anywhere_and_resume) {
    if (test_quick()) SKIP("not in the quick run");
    crash_anywhere(SFT);
    test_remove(test_path("a"));
    crash_anywhere(PPO);
}

/* Resuming a run that was over changes nothing: the normalisation of rewards stays, too. */
TEST(resume_after_the_end) {
    for (int s = SFT; s <= PPO; s++) {
        trip whole = {"a", .save = 3, .fail_after = -1, .logging = 1};
        trip twice = {"b", .save = 3, .fail_after = -1, .logging = 1};
        CHECK_EQ_I(travel((stage)s, llama_untied, &whole), RLHF_OK);
        CHECK_EQ_I(travel((stage)s, llama_untied, &twice), RLHF_OK);
        twice.resume = 1;
        CHECK_EQ_I(travel((stage)s, llama_untied, &twice), RLHF_OK);
        check_same_runs("a", "b");
        test_remove(test_path("a"));
        test_remove(test_path("b"));
    }
}

/* A new run in an old directory starts at the beginning, and leaves no state of the old one. */
TEST(a_new_run_in_an_old_directory) {
    trip other = {"b", .stop = 4, .fail_after = -1, .logging = 1};
    trip whole = {"a", .fail_after = -1, .logging = 1}, again = whole;
    again.dir = "b";
    CHECK_EQ_I(travel(SFT, llama_untied, &other), RLHF_STOPPED);
    CHECK_EQ_I(travel(SFT, llama_untied, &again), RLHF_OK);
    CHECK_EQ_I(travel(SFT, llama_untied, &whole), RLHF_OK);
    check_same_runs("a", "b");
    trip resume = {"c", .resume = 1, .fail_after = -1, .logging = 1};
    CHECK_EQ_I(travel(SFT, llama_untied, &resume), RLHF_OK); /* with nothing there to resume */
    check_same_runs("a", "c");
}

/* A trainer that was stopped can also just go on. */
TEST(stop_and_run_on) {
    int64_t stop = 2;
    rlhf_hooks hooks = test_hooks();
    hooks.user = &stop;
    hooks.progress = stop_at;
    lab l = {.stage = SFT, .model = llama_untied, .config = config_default(SFT)};
    l.config.c.max_steps = 5;
    lab_prepare(&l, &hooks);
    CHECK_EQ_I(lab_open(&l), RLHF_OK);
    CHECK_EQ_I(rlhf_trainer_run(l.t), RLHF_STOPPED);
    CHECK_EQ_I(rlhf_trainer_steps_done(l.t), 2);
    CHECK_EQ_I(rlhf_trainer_run(l.t), RLHF_OK);
    uint64_t stopped = hash_of(l.m);
    lab_close(&l);
    lab whole = {.stage = SFT, .model = llama_untied, .config = config_default(SFT)};
    whole.config.c.max_steps = 5;
    lab_start(&whole);
    CHECK_EQ_I(rlhf_trainer_run(whole.t), RLHF_OK);
    CHECK(hash_of(whole.m) == stopped);
    lab_close(&whole);
}

/* ---- not a number ---------------------------------------------------------------------------- */

static void not_finite(lab *l) {
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    static const uint8_t where[] = {P_LNF_W, P_QKV_W};
    lab_start(l);
    lab_step(l, 1);
    for (int i = 0; i < 3; i++)
        for (int k = 0; k < 2; k++) {
            float *w = model_w(l->m, where[k], 0) + 5, good = *w;
            int64_t optimizer = l->t->opt->step;
            *w = bad[i];
            l->m->version++;
            uint64_t before = hash_of(l->m);
            CHECK_EQ_I(rlhf_trainer_step(l->t), RLHF_ERR_NUMERIC);
            CHECK(strstr(rlhf_error(l->ctx), "not finite") != NULL);
            CHECK(hash_of(l->m) == before);
            CHECK_EQ_I(l->t->opt->step, optimizer);
            CHECK_EQ_I(rlhf_trainer_steps_done(l->t), 1);
            *w = good;
            l->m->version++;
        }
    /* With the old weight back the run goes on as if nothing had been. */
    lab_step(l, 1);
    uint64_t after = hash_of(l->m);
    lab_close(l);
    lab other = {.stage = l->stage, .model = l->model, .config = l->config};
    lab_start(&other);
    lab_step(&other, 2);
    CHECK(hash_of(other.m) == after);
    lab_close(&other);
}

TEST(numbers_that_are_not_finite) { for_each(not_finite); }

/* A finite loss whose gradient is not: the norm is looked at too. */
TEST(gradient_that_is_not_finite) {
    lab l = {.stage = RM, .model = llama_untied, .config = config_default(RM)};
    lab_start(&l);
    for (int i = 0; i < l.train->n; i++) l.train->record[i].weight = 1e38;
    for (int i = 0; i < 24; i++) model_w(l.m, P_SCORE, 0)[i] = i % 2 ? -90 : 100;
    l.m->version++;
    uint64_t before = hash_of(l.m);
    CHECK_EQ_I(rlhf_trainer_step(l.t), RLHF_ERR_NUMERIC);
    CHECK(hash_of(l.m) == before);
    lab_close(&l);
}

TEST(rewards_too_large_for_a_loss) {
    lab l = {.stage = PPO, .model = llama_untied, .config = config_default(PPO)};
    lab_start(&l);
    l.judge.every = 3e38f;
    uint64_t before = hash_of(l.m), value = hash_of(l.t->value);
    CHECK_EQ_I(rlhf_trainer_step(l.t), RLHF_ERR_NUMERIC);
    CHECK(hash_of(l.m) == before && hash_of(l.t->value) == value);
    lab_close(&l);
}

/* ---- reward functions ------------------------------------------------------------------------ */

static void judge_case(float every, rlhf_status returned, rlhf_status want, double score) {
    lab l = {.stage = PPO, .model = llama_untied, .config = config_default(PPO)};
    lab_start(&l);
    l.judge.every = every;
    l.judge.status = returned;
    l.judge.fail_after = returned == RLHF_OK ? -1 : 0;
    uint64_t before = hash_of(l.m);
    CHECK_EQ_I(rlhf_trainer_step(l.t), want);
    if (want == RLHF_OK) CHECK_NEAR(metric(&l, "objective/scores"), score, 0);
    else {
        CHECK(hash_of(l.m) == before);
        CHECK(strstr(rlhf_error(l.ctx), "reward function") != NULL);
    }
    lab_close(&l);
}

TEST(reward_functions) {
    judge_case(2.5f, RLHF_OK, RLHF_OK, 2.5);
    judge_case(NAN, RLHF_OK, RLHF_OK, 0);
    judge_case(INFINITY, RLHF_OK, RLHF_ERR_CALLBACK, 0);
    judge_case(-INFINITY, RLHF_OK, RLHF_ERR_CALLBACK, 0);
    judge_case(1, RLHF_ERR_DATA, RLHF_ERR_CALLBACK, 0);
    judge_case(1, RLHF_STOPPED, RLHF_STOPPED, 0);
}

/* What the function is shown, and the penalty for answers that do not end. */
static rlhf_status look(void *user, const rlhf_sample *s, int n, float *reward) {
    int *seen = user;
    for (int i = 0; i < n; i++) {
        int ends = s[i].completion_ids[s[i].n_completion - 1] == 2;
        CHECK_EQ_I(s[i].finished, ends);
        CHECK(s[i].n_completion >= 1 && s[i].n_completion <= 6);
        CHECK(s[i].finished || s[i].n_completion == 6);
        CHECK(s[i].completion_ids == s[i].prompt_ids + s[i].n_prompt);
        CHECK(s[i].logprob < 0 && s[i].prompt_index >= 0 && s[i].prompt_index < 24);
        CHECK_EQ_S(s[i].record, "{}");
        reward[i] = 1;
        seen[ends]++;
    }
    return RLHF_OK;
}

TEST(what_a_reward_function_sees) {
    int seen[2] = {0};
    lab l = {.stage = PPO, .model = llama_untied, .config = config_default(PPO)};
    l.config.ppo.batch_size = 64;
    l.config.ppo.missing_eos_penalty = 0.5;
    l.config.ppo.temperature = 3;
    lab_prepare(&l, NULL);
    CHECK_EQ_I(rlhf_ppo_open(l.m, NULL, l.train, NULL, look, seen, &l.config.ppo, &l.t), RLHF_OK);
    lab_step(&l, 1);
    CHECK(seen[0] > 0 && seen[1] > 0);
    CHECK_EQ_I(seen[0] + seen[1], 64);
    CHECK_EQ_I(metric(&l, "val/num_eos_tokens"), seen[1]);
    CHECK_NEAR(metric(&l, "objective/scores"), 1 - 0.5 * seen[0] / 64, 1e-12);
    lab_close(&l);
}

/* Each update draws answers of its own, even to the same prompts under the same weights. */
TEST(updates_draw_anew) {
    lab l = {.stage = PPO, .model = llama_untied, .config = config_default(PPO)};
    l.config.c.learning_rate = 0;
    l.config.ppo.batch_size = 24; /* every prompt once */
    l.config.c.num_train_epochs = 2;
    l.config.c.shuffle_dataset = 0;
    lab_start(&l);
    lab_step(&l, 1);
    double first = metric(&l, "objective/entropy");
    lab_step(&l, 1);
    CHECK(metric(&l, "objective/entropy") != first);
    lab_close(&l);
}

/* The KL coefficient follows the KL that was measured. */
TEST(kl_coefficient_adapts) {
    lab l = {.stage = PPO, .model = llama_untied, .config = config_default(PPO)};
    l.config.ppo.kl_target = 0.5;
    l.config.ppo.kl_horizon = 40;
    l.config.ppo.kl_coef = 0.1;
    lab_start(&l);
    double coef = 0.1;
    for (int i = 0; i < 3; i++) {
        lab_step(&l, 1);
        CHECK_NEAR(metric(&l, "objective/kl_coef"), coef, 1e-12);
        double err = metric(&l, "objective/kl") / 0.5 - 1;
        coef *= 1 + fmax(-0.2, fmin(0.2, err)) * 8 / 40;
    }
    CHECK(fabs(coef - 0.1) > 1e-3);
    lab_close(&l);
}

/* Rewards of a model and of a function add up. */
TEST(reward_model_and_function) {
    double score[3];
    for (int i = 0; i < 3; i++) {
        lab l = {.stage = PPO, .model = llama_untied, .config = config_default(PPO)};
        lab_prepare(&l, NULL);
        rlhf_model *reward = scorer_of(l.lm);
        model_init_score(reward, 3);
        reward->score_trained = 1;
        reward->score_mean = 0.25f;
        reward->score_std = 0.5f;
        l.judge.every = 1.5f;
        CHECK_EQ_I(rlhf_ppo_open(l.m, NULL, l.train, i == 1 ? NULL : reward,
                                 i == 0 ? NULL : judge_fn, &l.judge, &l.config.ppo, &l.t), RLHF_OK);
        lab_step(&l, 1);
        score[i] = metric(&l, "objective/scores");
        rlhf_trainer_close(l.t);
        l.t = NULL;
        rlhf_model_close(reward);
        lab_close(&l);
    }
    CHECK_NEAR(score[0] + score[1], score[2], 1e-6);
    CHECK_NEAR(score[1], 1.5, 0);
    CHECK(score[0] != 0);
}

/* ---- learning -------------------------------------------------------------------------------- */

/* The end of a text bears loss like any token: what has learned short answers stops by itself. */
TEST(learns_to_stop) {
    static const char *const words[] = {"red", "green", "blue", "white", "black", "grey"};
    char jsonl[2048] = "";
    for (int i = 0; i < 6; i++) {
        size_t at = strlen(jsonl);
        snprintf(jsonl + at, sizeof jsonl - at,
                 "{\"prompt\":\"say %s:\",\"completion\":\" %s %s.\"}\n", words[i], words[i],
                 words[(i + 1) % 6]);
    }
    const char *texts[] = {jsonl};
    size_t lens[] = {strlen(jsonl)};
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_tokenizer *tok = NULL;
    rlhf_dataset *d = NULL;
    rlhf_trainer *t = NULL;
    REQUIRE(ctx);
    CHECK_EQ_I(rlhf_tokenizer_train(ctx, texts, lens, 1, 300, &tok), RLHF_OK);
    rlhf_data_config dc = rlhf_data_config_default(RLHF_DATA_SFT);
    CHECK_EQ_I(rlhf_dataset_parse(ctx, jsonl, lens[0], "words", tok, &dc, &d), RLHF_OK);
    REQUIRE(tok && d);
    int eos = rlhf_tokenizer_eos(tok);
    for (int i = 0; i < d->n; i++) {
        const data_seq *s = &d->record[i].a;
        CHECK(s->ids[s->n - 1] == eos && s->loss[s->n - 1] && !s->loss[0]);
    }
    rlhf_model *m = NULL;
    CHECK_EQ_I(rlhf_model_init(ctx, test_write("config.json", llama_untied),
                               rlhf_tokenizer_vocab_size(tok), -1, eos, 3, &m), RLHF_OK);
    rlhf_sft_config c = rlhf_sft_config_default();
    c.learning_rate = 1e-2;
    c.num_train_epochs = 40;
    CHECK_EQ_I(rlhf_sft_open(m, tok, d, d, &c, &t), RLHF_OK);
    CHECK_EQ_I(rlhf_trainer_run(t), RLHF_OK);
    CHECK(rlhf_trainer_metric(t, "eval_loss") < 0.1);
    CHECK_NEAR(rlhf_trainer_metric(t, "eval_mean_token_accuracy"), 1, 0);

    const char *prompts[] = {"say blue:", "say grey:"}, *answers[] = {" blue white.", " grey red."};
    rlhf_generate_config gc = rlhf_generate_config_default();
    rlhf_sample *s = NULL;
    int n = 0;
    gc.temperature = 0;
    gc.max_new_tokens = 25;
    CHECK_EQ_I(rlhf_generate(m, tok, &gc, prompts, 2, &s, &n), RLHF_OK);
    for (int i = 0; i < n; i++) {
        CHECK_EQ_S(s[i].completion, answers[i]);
        CHECK(s[i].finished && s[i].completion_ids[s[i].n_completion - 1] == eos);
    }
    rlhf_samples_free(ctx, s, n);
    rlhf_trainer_close(t);
    rlhf_dataset_close(d);
    rlhf_model_close(m);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
}

/* Accuracy on pairs that were not trained on, after training on pairs of the same rule. */
static double learned_accuracy(data_rule rule, rlhf_model **model, lab *l) {
    *l = (lab){.stage = RM, .model = llama_untied, .config = config_default(RM)};
    lab_prepare(l, NULL);
    rlhf_dataset_close(l->train);
    rlhf_dataset_close(l->eval);
    l->train = data_make(l->ctx, RLHF_DATA_PREFERENCE, 400, 5, rule);
    l->eval = data_make(l->ctx, RLHF_DATA_PREFERENCE, 400, 6, rule);
    l->config.c.per_device_train_batch_size = 16;
    l->config.c.num_train_epochs = 3;
    l->config.rm.normalize_samples = 800;
    *model = l->m;
    CHECK_EQ_I(rlhf_rm_open(l->m, NULL, NULL, l->train, l->eval, &l->config.rm, &l->t), RLHF_OK);
    CHECK_EQ_I(rlhf_trainer_run(l->t), RLHF_OK);
    return metric(l, "eval_accuracy");
}

/* Scores of the answers that they are normalised with have mean 0 and deviation 1. */
static void check_normalized(lab *l) {
    double mean = 0, square = 0;
    int n = 2 * l->train->n;
    for (int i = 0; i < n; i++) {
        const data_record *r = l->train->record + i / 2;
        const data_seq *s = i % 2 ? &r->b : &r->a;
        float score;
        CHECK_EQ_I(rlhf_model_score(l->m, s->ids, s->n, &score), RLHF_OK);
        mean += (double)score / n;
        square += (double)score * (double)score / n;
    }
    CHECK_NEAR(mean, 0, 1e-5);
    CHECK_NEAR(square, 1, 1e-4);
}

TEST(learns_a_preference) {
    rlhf_model *m;
    lab l;
    double accuracy = learned_accuracy(HAS_SEVEN, &m, &l);
    CHECK(accuracy > 0.95);
    check_normalized(&l);
    lab_close(&l);
}

TEST(learns_nothing_from_coins) {
    rlhf_model *m;
    lab l;
    double accuracy = learned_accuracy(COIN, &m, &l);
    CHECK(accuracy > 0.4 && accuracy < 0.6); /* four standard deviations */
    lab_close(&l);
}

TEST(untrained_heads_do_not_score) {
    lab l = {.stage = PPO, .model = llama_untied, .config = config_default(PPO)};
    lab_prepare(&l, NULL);
    rlhf_model *m = scorer_of(l.lm);
    int32_t ids[] = {4, 5, 6};
    float score = 0;
    CHECK_EQ_I(rlhf_model_score(m, ids, 3, &score), RLHF_ERR_ARG);
    CHECK(strstr(rlhf_error(l.ctx), "never trained") != NULL);
    CHECK_EQ_I(rlhf_ppo_open(l.m, NULL, l.train, m, NULL, NULL, &l.config.ppo, &l.t), RLHF_ERR_ARG);
    CHECK_EQ_I(rlhf_model_score(l.lm, ids, 3, &score), RLHF_ERR_ARG);
    /* A checkpoint of it has no head either. */
    char dir[512];
    snprintf(dir, sizeof dir, "%s", test_path("untrained"));
    rlhf_model *again = NULL;
    CHECK_EQ_I(rlhf_model_save(m, NULL, dir), RLHF_OK);
    CHECK_EQ_I(rlhf_model_open(l.ctx, dir, &again), RLHF_OK);
    CHECK_EQ_I(rlhf_model_score(again, ids, 3, &score), RLHF_ERR_ARG);
    rlhf_model_close(again);
    rlhf_model_close(m);
    lab_close(&l);
}

/* A reward is gained, and a heavy KL penalty holds the policy where it was. */
TEST(ppo_trades_reward_for_kl) {
    double score[2], kl[2];
    for (int i = 0; i < 2; i++) {
        lab l = {.stage = PPO, .model = llama_untied, .config = config_default(PPO)};
        l.config.ppo.batch_size = 64;
        l.config.c.per_device_train_batch_size = 64;
        l.config.c.max_steps = 30;
        l.config.ppo.kl_coef = i ? 10 : 0.01;
        l.config.c.learning_rate = 1e-3;
        lab_start(&l);
        lab_step(&l, 1);
        double start = metric(&l, "objective/scores");
        CHECK_EQ_I(rlhf_trainer_run(l.t), RLHF_OK);
        score[i] = metric(&l, "objective/scores") - start;
        kl[i] = metric(&l, "objective/kl_exact");
        lab_close(&l);
    }
    if (getenv("RLHF_TEST_VERBOSE"))
        printf("[score %+.3f, KL %.3f; %+.3f, %.3f] ", score[0], kl[0], score[1], kl[1]);
    CHECK(score[0] > 0.2);
    CHECK(kl[0] > 0.2);
    CHECK(fabs(score[1]) < 0.1);
    CHECK(kl[1] < 0.1);
}

TEST_MAIN(CASE(no_learning_rate_no_change), CASE(optimizer_steps), CASE(lent_gradients),
          CASE(sft_micro_batches),
          CASE(rm_micro_batches), CASE(ppo_micro_batches), CASE(sft_tokens_weigh_the_same),
          CASE(ratio_is_one), CASE(ratio_leaves_one), CASE(sft_stop_and_resume),
          CASE(rm_stop_and_resume), CASE(ppo_stop_and_resume), CASE(ppo_crash_and_resume),
          CASE(crash_anywhere_and_resume), CASE(resume_after_the_end),
          CASE(a_new_run_in_an_old_directory), CASE(stop_and_run_on),
          CASE(numbers_that_are_not_finite), CASE(gradient_that_is_not_finite),
          CASE(rewards_too_large_for_a_loss), CASE(reward_functions),
          CASE(what_a_reward_function_sees), CASE(updates_draw_anew),
          CASE(kl_coefficient_adapts), CASE(reward_model_and_function), CASE(learns_to_stop),
          CASE(learns_a_preference), CASE(learns_nothing_from_coins),
          CASE(untrained_heads_do_not_score), CASE(ppo_trades_reward_for_kl))
