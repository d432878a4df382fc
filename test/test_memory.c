/* The table of memory before a run against what the run then takes, by the allocation hook and the
 * files that are mapped: within ten percent, for each stage, with weights that are trained and with
 * adapters, and with layers that are computed again. And what sampling keeps of such files. */

#include "../rlhf.c"
#include "test.h"

/* Large enough that what is counted outweighs what is not. */
static const char shape[] =
    "{\"model_type\": \"llama\", \"vocab_size\": 2048, \"hidden_size\": 256,"
    " \"num_hidden_layers\": %d,"
    " \"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"intermediate_size\": 768,"
    " \"max_position_embeddings\": 512, \"tie_word_embeddings\": true, \"eos_token_id\": 2}";

typedef enum stage { SFT, RM, PPO } stage;

/* A run: its stage, the length of its records, and the options that matter here. */
typedef struct run {
    stage stage;
    int words, peft, recompute, batch, samples;
    double limit;
    int shared; /* ppo: one trunk */
    int alike;  /* prompts differ in the end only: less than the table says */
} run;

static void save_run(rlhf_ctx *ctx, void *arg) {
    (void)ctx;
    ckpt_save(arg, test_path("base"), 'b');
}

/* The checkpoint, in bfloat16, and a reward model of it. */
static void bases_make(rlhf_tokenizer **tok, rlhf_ctx *ctx) {
    const char *text = "the old house by the river";
    size_t len = strlen(text);
    rlhf_model *m;
    OK(ctx, rlhf_tokenizer_train(ctx, &text, &len, 1, 257, tok));
    char config[sizeof shape + 16];
    snprintf(config, sizeof config, shape, test_quick() ? 3 : 4);
    OK(ctx, rlhf_model_init(ctx, test_write("shape.json", config), 0, -1, -1, 3, &m));
    OK(ctx, test_call(ctx, save_run, m));
    rlhf_model_close(m);
}

/* Records of about so many tokens each, one a byte. What begins alike is computed once, hence the
 * number in front. */
static rlhf_dataset *records(rlhf_ctx *ctx, rlhf_tokenizer *tok, const run *r) {
    static const rlhf_data_kind kinds[] = {RLHF_DATA_SFT, RLHF_DATA_PREFERENCE, RLHF_DATA_PROMPT};
    char text[40000], *at = text;
    for (int i = 0; i < 8; i++) {
        at += sprintf(at, "{\"prompt\": \"%d%0*d\"", r->alike ? 0 : i, r->words - 1, i);
        if (r->stage == SFT) at += sprintf(at, ", \"completion\": \"%0*d\"", r->words, i);
        if (r->stage == RM)
            at += sprintf(at, ", \"chosen\": \"%0*d\", \"rejected\": \"x%d\"", r->words, i, i);
        at += sprintf(at, "}\n");
    }
    rlhf_data_config c = rlhf_data_config_default(kinds[r->stage]);
    rlhf_dataset *d;
    OK(ctx, rlhf_dataset_parse(ctx, text, strlen(text), "records", tok, &c, &d));
    return d;
}

static void common(const run *r, train_config *c) {
    c->output_dir = test_path("run");
    c->use_peft = r->peft;
    c->lora_target_modules = "all-linear";
    c->gradient_checkpointing = r->recompute;
    c->per_device_train_batch_size = r->batch;
    c->memory_limit = r->limit;
    c->max_steps = 1;
}

static rlhf_status run_open(rlhf_ctx *ctx, const run *r, rlhf_tokenizer *tok, rlhf_dataset *d,
                            rlhf_model *m[3], rlhf_trainer **t) {
    union {
        train_config c;
        rlhf_sft_config sft;
        rlhf_rm_config rm;
        rlhf_ppo_config ppo;
    } u;
    (void)ctx;
    if (r->stage == SFT) u.sft = rlhf_sft_config_default();
    if (r->stage == RM) u.rm = rlhf_rm_config_default();
    if (r->stage == PPO) u.ppo = rlhf_ppo_config_default();
    common(r, &u.c);
    if (r->stage == SFT) u.sft.sample_prompts = r->samples;
    if (r->stage == SFT) return rlhf_sft_open(m[0], tok, d, NULL, &u.sft, t);
    if (r->stage == RM) u.rm.normalize_samples = 16;
    if (r->stage == RM) return rlhf_rm_open(m[1], m[0], tok, d, NULL, &u.rm, t);
    u.ppo.batch_size = 8;
    u.ppo.best_of_n = 0;
    u.ppo.num_ppo_epochs = 1;
    u.ppo.response_length = 16;
    u.ppo.shared_trunk = r->shared;
    return rlhf_ppo_open(m[0], tok, d, m[1], NULL, NULL, &u.ppo, t);
}

/* Bytes that the files of open bases take: all but matrices whose panels are there instead. */
static int64_t mapped(const rlhf_ctx *ctx) {
    int64_t bytes = 0;
    for (const model_base *b = ctx->bases; b; b = b->next) {
        for (int i = 0; i < b->n_maps; i++) bytes += (int64_t)b->maps[i]->size;
        for (int i = 0; i < b->layers * P_COUNT; i++)
            for (int q = 0; b->packed[i] && q < b->pieces[i]; q++)
                bytes -= (int64_t)b->piece[i][q].rows * b->piece[i][q].cols *
                         (b->piece[i][q].kind == '4' ? 4 : 2);
    }
    return bytes;
}

static void reward_ready(rlhf_ctx *ctx, void *arg) {
    rlhf_model *m = arg;
    (void)ctx;
    model_init_score(m, 1);
    m->score_trained = 1;
}

/* How a run is done: the bytes that the table says, tokens at once, whether layers are computed
 * again. */
typedef struct plan {
    double total;
    int at_once, recompute;
} plan;

/* Returns a hash of the weights. */
static uint64_t check_run(const run *r, plan *p) {
    rlhf_ctx *ctx = test_context("auto", 2);
    rlhf_tokenizer *tok;
    rlhf_model *m[3] = {NULL, NULL, NULL};
    rlhf_trainer *t = NULL;
    *p = (plan){0};
    bases_make(&tok, ctx);
    OK(ctx, rlhf_model_open(ctx, test_path("base"), &m[0]));
    if (r->stage != SFT) OK(ctx, rlhf_model_clone(m[0], RLHF_HEAD_SCORE, &m[1]));
    if (r->stage != SFT) OK(ctx, test_call(ctx, reward_ready, m[1]));
    rlhf_dataset *d = records(ctx, tok, r);
    ctx->mem_peak = ctx->mem_now;
    OK(ctx, run_open(ctx, r, tok, d, m, &t));
    if (!t) return 0;
    rlhf_memory need = rlhf_trainer_memory(t);
    OK(ctx, rlhf_trainer_run(t));
    double took = (double)(ctx->mem_peak + mapped(ctx));
    double said = (double)(need.total - TRAIN_PROGRAM);
    CHECK(need.weights >= 0 && need.other >= 0);
    if (!(took <= 1.1 * said && took >= (r->alike ? 0.3 : 0.9) * said))
        test_fail(__FILE__, __LINE__,
                  "stage %d, %d words, peft %d, recompute %d, batch %d: took %.2f MB, said %.2f: "
                  "weights %.2f adapters %.2f optimizer %.2f activations %.2f cache %.2f scratch "
                  "%.2f other %.2f; arena %.2f",
                  (int)r->stage, r->words, r->peft, r->recompute, r->batch, took / 1e6, said / 1e6,
                  (double)need.weights / 1e6, (double)need.adapters / 1e6,
                  (double)need.optimizer / 1e6, (double)need.activations / 1e6,
                  (double)need.cache / 1e6, (double)need.scratch / 1e6, (double)need.other / 1e6,
                  (double)t->ws.peak / 1e6);
    if (r->limit > 0) CHECK((double)need.total <= r->limit * 1e9);
    *p = (plan){(double)need.total, t->at_once, t->opt->model[0]->recompute};
    uint64_t hash = model_hash(m[r->stage == RM]);
    rlhf_trainer_close(t);
    rlhf_dataset_close(d);
    rlhf_model_close(m[1]);
    rlhf_model_close(m[0]);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
    test_remove(test_path("run"));
    test_remove(test_path("base"));
    return hash;
}

TEST(table_and_run) {
    plan p;
    for (int s = SFT; s <= PPO; s++)
        for (int k = 0; k < 8; k++) {
            /* Every value of each with either of the others; quick, one run of a stage. */
            if (k != 0 && k != 3 && k != 5 && k != 6) continue;
            if (test_quick() && k != (s == PPO ? 0 : 6)) continue;
            int words = !(k >> 2 & 1) ? 20 : test_quick() ? 40 : 150;
            check_run(&(run){(stage)s, words, k & 1, k >> 1 & 1, 8, 8, 0, 0, 0}, &p);
        }
    for (int s = SFT; s <= PPO; s++)
        check_run(&(run){(stage)s, test_quick() ? 20 : 75, 1, 0, 8, 8, 0, 0, 1}, &p);
}

/* A value head on the policy's trunk takes neither weights nor an optimizer's state. */
TEST(one_trunk) {
    if (test_quick()) SKIP("not in the quick run");
    for (int peft = 0; peft < 2; peft++) {
        plan apart, one;
        run r = {PPO, 20, peft, 0, 8, 8, 0, 0, 0};
        check_run(&r, &apart);
        r.shared = 1;
        check_run(&r, &one);
        CHECK(one.total < apart.total);
    }
}

/* A limit cuts micro-batches, then has layers computed again: less memory, the same weights. */
TEST(a_limit_changes_no_bit) {
    if (test_quick()) SKIP("not in the quick run");
    for (int peft = 0; peft < 2; peft++) {
        run r = {SFT, 75, peft, 0, 8, 0, 0, 0, 0};
        plan whole, cut, again;
        uint64_t hash = check_run(&r, &whole);
        r.limit = 0.97 * whole.total / 1e9;
        CHECK(check_run(&r, &cut) == hash);
        CHECK(cut.at_once < whole.at_once && !cut.recompute);
        r.limit = 0.99 * cut.total / 1e9;
        CHECK(check_run(&r, &again) == hash);
        CHECK(again.recompute);
    }
}

/* Bytes of files called `name` that are in this process's memory, -1 where the system does not
 * say. */
static double resident(const char *name) {
    FILE *f = fopen("/proc/self/smaps", "r");
    double sum = f ? 0 : -1, kb;
    int inside = 0;
    for (char line[4096]; f && fgets(line, sizeof line, f);) {
        if (strchr(line, '-') && !strstr(line, "kB")) inside = strstr(line, name) != NULL;
        if (inside && sscanf(line, "Rss: %lf kB", &kb) == 1) sum += kb * 1024;
    }
    if (f) fclose(f);
    return sum;
}

/* Panels take the place of what files hold: of the embedding alone, some rows are read after it was
 * packed, and what reads all of the files leaves nothing behind. */
TEST(panels_in_place_of_files) {
    rlhf_ctx *ctx = test_context("auto", 2);
    rlhf_tokenizer *tok;
    rlhf_model *m;
    rlhf_sample *s[2];
    int n;
    bases_make(&tok, ctx);
    OK(ctx, rlhf_model_open(ctx, test_path("base"), &m));
    double size = (double)mapped(ctx), opened = resident("model.safetensors");
    char prompt[2 * MODEL_MANY_ROWS + 1];
    memset(prompt, 'x', sizeof prompt - 1);
    prompt[sizeof prompt - 1] = 0;
    const char *prompts[1] = {prompt};
    rlhf_generate_config c = rlhf_generate_config_default();
    c.max_new_tokens = 8;
    for (int i = 0; i < 2; i++) OK(ctx, rlhf_generate(m, tok, &c, prompts, 1, &s[i], &n));
    CHECK(s[0]->logprob == s[1]->logprob);
    char hash[17];
    OK(ctx, rlhf_model_hash(m, hash));
    double left = resident("model.safetensors");
    CHECK(size > 4e6 && left < 0.2 * size);
    for (int i = 0; i < 2; i++) rlhf_samples_free(ctx, s[i], n);
    rlhf_model_close(m);
    rlhf_tokenizer_close(tok);
    rlhf_close(ctx);
    test_remove(test_path("base"));
    if (opened < 0) SKIP("the system does not say what is resident");
}

/* Control groups as files: a line of `groups`, and the least limit from its directory upward. */
static double least(const char *line, double (*allows)(const char *)) {
    char groups[300];
    snprintf(groups, sizeof groups, "%s", test_write("groups", line));
    return base_group_least(groups, test_path("root"), allows);
}

static void limit(const char *file, const char *text) {
    char path[300];
    snprintf(path, sizeof path, "%s", test_path(file));
    for (char *p = path + 1; (p = strchr(p, '/')); *p++ = '/') {
        *p = 0;
        mkdir(path, 0777);
    }
    test_write(file, text);
}

TEST(limits_of_containers) {
    double (*bytes)(const char *) = base_group_bytes, (*cpus)(const char *) = base_group_processors;
    test_remove(test_path("root"));
    /* None: no file, no such directory, no line, "max". */
    CHECK(base_group_least(test_path("none"), test_path("root"), bytes) == INFINITY);
    CHECK(least("0::/a/b\n", bytes) == INFINITY && least("rubbish\n\n:\n", cpus) == INFINITY);
    limit("root/memory.max", "max\n");
    limit("root/cpu.max", "max 100000\n");
    CHECK(least("0::/a/b\n", bytes) == INFINITY && least("0::/a/b\n", cpus) == INFINITY);
    /* The second version: one directory has all. The least of the path counts, no neighbour's. */
    limit("root/a/memory.max", "700\n");
    limit("root/a/b/memory.max", "900\n");
    limit("root/c/memory.max", "5\n");
    limit("root/a/b/cpu.max", "150000 100000\n");
    CHECK(least("0::/a/b\n", bytes) == 700 && least("0::/a\n", cpus) == INFINITY);
    CHECK(least("0::/a/b\n", cpus) == 1.5 && least("0::/\n", bytes) == INFINITY);
    /* The first: a directory for each controller; a path that is not there leads to the top. */
    limit("root/cpu,cpuacct/cpu.cfs_quota_us", "-1\n");
    limit("root/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
    limit("root/memory/memory.limit_in_bytes", "9223372036854771712\n");
    CHECK(least("4:cpu,cpuacct:/\n", cpus) == INFINITY && least("5:memory:/\n", bytes) > 1e18);
    limit("root/cpu,cpuacct/cpu.cfs_quota_us", "200000\n");
    limit("root/memory/memory.limit_in_bytes", "800\n");
    CHECK(least("5:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n0::/c\n", cpus) == 2);
    CHECK(least("5:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n", bytes) == 800);
    CHECK(base_memory() > 0 && par_default_threads() >= 1);
    test_remove(test_path("root"));
}

static char warned[400];

static void note_warning(void *user, rlhf_level level, const char *text) {
    (void)user;
    size_t n = strlen(warned);
    if (level == RLHF_LOG_WARNING) snprintf(warned + n, sizeof warned - n, "%s", text);
}

/* A run for which there is no memory is warned of once: when it is known what it takes, or before
 * the gradient and the moments are there, if already they are too much. A limit is an error then,
 * at the same place. */
TEST(more_than_the_machine_has) {
    double total = 0;
    for (int much = 0; much < 4; much++) {
        rlhf_ctx *ctx = test_context("auto", 1);
        rlhf_tokenizer *tok;
        rlhf_model *m[3] = {NULL};
        rlhf_trainer *t = NULL;
        bases_make(&tok, ctx);
        OK(ctx, rlhf_model_open(ctx, test_path("base"), &m[0]));
        run r = {SFT, 20, 0, 0, 2, 0, much == 3 ? 0.002 : 0, 0, 0};
        rlhf_dataset *d = records(ctx, tok, &r);
        ctx->hooks.log = note_warning;
        ctx->memory = much == 0 ? 1e12 : much == 1 ? total - 1000 : 1e6;
        *warned = 0;
        rlhf_status status = run_open(ctx, &r, tok, d, m, &t);
        double own = 16e-9 * (double)m[0]->n, takes = 0, has = 0;
        if (much == 0) total = (double)t->memory.total;
        int n = sscanf(warned, "the run takes %lf GB or more, the machine or container has %lf: m",
                       &takes, &has);
        CHECK(n == (much == 1 || much == 2 ? 2 : EOF));
        if (much == 1) CHECK_NEAR(takes, total * 1e-9, 0.006);
        if (much == 2) CHECK_NEAR(takes, own, 0.006);
        if (n == 2) CHECK_NEAR(has, ctx->memory * 1e-9, 0.006);
        CHECK(!strstr(warned + (*warned != 0), "the run") && own > 0.02);
        CHECK(status == (much < 3 ? RLHF_OK : RLHF_ERR_ARG));
        if (t == NULL) CHECK(strstr(rlhf_error(ctx), "before its first step") != NULL);
        if (t) rlhf_trainer_close(t);
        rlhf_dataset_close(d);
        rlhf_model_close(m[0]);
        rlhf_tokenizer_close(tok);
        rlhf_close(ctx);
        test_remove(test_path("base"));
        test_remove(test_path("run"));
    }
}

/* Linux's description of a second-level cache as files, and the part of one of so many threads. */
static size_t cache(const char *size, const char *list, int threads) {
    limit("root/level", "2\n");
    limit("root/size", size);
    limit("root/shared_cpu_list", list);
    return par_cache_size(test_path("root"), threads);
}

TEST(cache_of_a_thread) {
    int all = par_default_threads();
    test_remove(test_path("root"));
    CHECK(par_listed("") == 0 && par_listed("5\n") == 1 && par_listed("0-3,8\n") == 5 &&
          par_listed("0,8-9,16\n") == 4);
    CHECK(par_cache_size(PAR_CACHE, 1) >= PAR_CACHE_LEAST);
    /* Alone, it has all, if others could run beside it; of two processors that share it, half, if
     * both run. */
    CHECK(cache("2048K\n", "0\n", all) == 2 << 20 && cache("2048K\n", "0\n", 1) == 2 << 20);
    CHECK(cache("2048K\n", "0,8\n", all) == 1 << 20);
    CHECK(cache("2048K\n", "0,8\n", 1) == (all > 1 ? 2 << 20 : 1 << 20));
    CHECK(cache("12288K\n", "0-3\n", all) == 3 << 20);
    CHECK(cache("512K\n", "0-7\n", all) == PAR_CACHE_LEAST);
    /* Of another level, or missing: what the system says elsewhere, at least something. */
    limit("root/level", "3\n");
    size_t other = par_cache_size(test_path("root"), all);
    CHECK(other >= PAR_CACHE_LEAST && other == par_cache_size(test_path("none"), all));
    test_remove(test_path("root"));
}

TEST_MAIN(CASE(table_and_run), CASE(one_trunk), CASE(a_limit_changes_no_bit),
          CASE(panels_in_place_of_files),
          CASE(limits_of_containers), CASE(cache_of_a_thread),
          CASE(more_than_the_machine_has))
