/* Adapters and frozen weights: adapters against the merged model and their gradients against the
 * chain rule, weights mapped in the dtype of their file, the directories of PEFT, dropout, layers
 * that are computed again, and trainers whose models share one base. */

#include "../rlhf.c"
#include "test.h"

/* ---- models ---------------------------------------------------------------------------------- */

/* 104 positions, so that a sequence takes both ways through a product (MODEL_MANY_ROWS). */
static const char gpt2[] =
    "{'model_type':'gpt2','vocab_size':53,'n_embd':24,'n_layer':2,'n_head':3,'n_positions':104,"
    "'n_inner':40,'eos_token_id':2}";
static const char llama[] =
    "{'model_type':'llama','vocab_size':53,'hidden_size':24,'num_hidden_layers':2,"
    "'num_attention_heads':4,'num_key_value_heads':2,'intermediate_size':36,"
    "'max_position_embeddings':104,'eos_token_id':2}";
static const char qwen2[] = /* biases of queries, keys and values */
    "{'model_type':'qwen2','vocab_size':53,'hidden_size':20,'num_hidden_layers':3,"
    "'num_attention_heads':2,'num_key_value_heads':1,'head_dim':8,'intermediate_size':28,"
    "'max_position_embeddings':104,'tie_word_embeddings':true,'eos_token_id':2}";
static const char neox[] = /* heads interleaved in one matrix */
    "{'model_type':'gpt_neox','vocab_size':53,'hidden_size':24,'num_hidden_layers':2,"
    "'num_attention_heads':3,'intermediate_size':40,'max_position_embeddings':104,"
    "'rotary_pct':0.5,'eos_token_id':2}";
static const char gemma2[] =
    "{'model_type':'gemma2','vocab_size':53,'hidden_size':20,'num_hidden_layers':2,"
    "'num_attention_heads':4,'num_key_value_heads':2,'head_dim':8,'intermediate_size':30,"
    "'max_position_embeddings':104,'query_pre_attn_scalar':5,'sliding_window':12,"
    "'attn_logit_softcapping':5.0,'final_logit_softcapping':8.0,'eos_token_id':2}";
static const char tall[] = /* more rows of the embedding than are widened at a time */
    "{'model_type':'llama','vocab_size':9001,'hidden_size':64,'num_hidden_layers':1,"
    "'num_attention_heads':2,'intermediate_size':32,'max_position_embeddings':104,"
    "'tie_word_embeddings':true}";
static const char *const configs[] = {gpt2, llama, qwen2, neox, gemma2};
enum { CONFIGS = sizeof configs / sizeof *configs, VOCAB = 53, LONG = 100 };

/* A context whose products are of bfloat16, or of floats. */
static rlhf_ctx *context(const char *isa, int threads, int half) {
    rlhf_options o = rlhf_options_default();
    rlhf_ctx *ctx = NULL;
    o.isa = isa;
    o.threads = threads;
    o.dtype = half ? "bf16" : "f32";
    o.hooks = test_hooks();
    OK(ctx, rlhf_open(&ctx, &o));
    return ctx;
}

/* What a call inside the library needs. */
typedef struct inside {
    const char *text; /* a config.json with ' for ", targets, a directory */
    rlhf_model *m;
    model_lora lora;
    rlhf_dataset *d;
    int kind, n;
} inside;

static void new_run(rlhf_ctx *ctx, void *arg) {
    inside *o = arg;
    char text[1024];
    snprintf(text, sizeof text, "%s", o->text);
    for (char *c = text; *c; c++)
        if (*c == '\'') *c = '"';
    json_src src = json_source(ctx, "config.json");
    json_t *config = json_hold(ctx, json_loads(text, 0, NULL));
    o->m = model_new(ctx, &src, config);
    model_place(o->m, NULL);
    o->m->config = config;
    err_keep(ctx);
    model_randomize(o->m, 7);
}

/* A number as a file of a dtype holds it. */
static float as_stored(float x, char kind) {
    if (kind == '4') return x;
    return kind == 'h' ? v_ieee1(ckpt_to_half(x)) : v_wide1(v_half1(x));
}

/* A model with weights of its own, all of them random and exact in the dtype, in which it is
 * saved. */
static rlhf_model *model_make(rlhf_ctx *ctx, const char *config, char kind) {
    inside o = {.text = config};
    OK(ctx, test_call(ctx, new_run, &o));
    rlhf_model *m = o.m;
    for (int p = 0; p < P_COUNT; p++)
        for (int l = 0; l < model_param_layers(m, p); l++)
            for (size_t i = 0; i < m->slot[p].n; i++) {
                size_t at = model_at(m, p, l) + i;
                double u = 2 * rng_uniform(1, 1000, at) - 1;
                float x = (float)(m->slot[p].cols > 1 ? 0.4 * u : (double)m->w[at] + 0.3 * u);
                m->w[at] = as_stored(x, kind);
            }
    if (kind != '4') memset(m->stored, kind, model_tensors(m) * (size_t)m->c.layers);
    m->version++;
    return m;
}

/* Writes a model of its own into the test's folder. */
static void base_make(rlhf_ctx *ctx, const char *config, char kind, const char *name) {
    rlhf_model *m = model_make(ctx, config, kind);
    OK(ctx, rlhf_model_save(m, NULL, test_path(name)));
    rlhf_model_close(m);
}

static rlhf_model *open_in(rlhf_ctx *ctx, const char *name) {
    rlhf_model *m = NULL;
    OK(ctx, rlhf_model_open(ctx, test_path(name), &m));
    return m;
}

static rlhf_model *copy_of(rlhf_model *m, rlhf_head head) {
    rlhf_model *copy = NULL;
    OK(m->ctx, rlhf_model_clone(m, head, &copy));
    return copy;
}

static void adapt_run(rlhf_ctx *ctx, void *arg) {
    inside *o = arg;
    (void)ctx;
    ckpt_targets(o->m, "targets", o->text, &o->lora);
    model_adapt(o->m, &o->lora, 5);
}

/* Fills what is the model's own with numbers that are always the same. */
static void fill_own(rlhf_model *m, float size) {
    for (int p = 0; p < P_COUNT; p++)
        for (int l = 0; l < model_own_layers(m, p); l++)
            for (size_t i = 0; i < m->slot[p].n; i++) {
                double u = rng_uniform(2, 1000 + (uint64_t)p, i * 16 + (uint64_t)l);
                model_w(m, p, l)[i] = size * (float)(2 * u - 1);
            }
    m->version++;
}

static void adapt(rlhf_model *m, const char *targets, model_lora lora) {
    inside o = {.text = targets, .m = m, .lora = lora};
    OK(m->ctx, test_call(m->ctx, adapt_run, &o));
}

static void thaw_run(rlhf_ctx *ctx, void *arg) {
    (void)ctx;
    model_thaw(arg);
}

static void thaw(rlhf_model *m) { OK(m->ctx, test_call(m->ctx, thaw_run, m)); }

static int bases(const rlhf_ctx *ctx) {
    int n = 0;
    for (const model_base *b = ctx->bases; b; b = b->next) n++;
    return n;
}

/* ---- passes ---------------------------------------------------------------------------------- */

static int32_t token(int i) { return 3 + (int32_t)(rng_u64(3, 77, (uint64_t)i) % (VOCAB - 3)); }

/* Logits of n tokens: a block of n * vocab floats. */
static float *logits_of(rlhf_model *m, int n) {
    int32_t ids[LONG];
    float *out = calloc((size_t)n * (size_t)m->c.vocab, sizeof *out);
    for (int i = 0; i < n; i++) ids[i] = token(i);
    OK(m->ctx, rlhf_model_logits(m, ids, n, out));
    return out;
}

static void same_logits(rlhf_model *a, rlhf_model *b, int n) {
    float *x = logits_of(a, n), *y = logits_of(b, n);
    CHECK_BITS(x, y, n * a->c.vocab);
    free(x);
    free(y);
}

/* Three sequences, a loss, and the gradients of what is the model's own. The loss of a language
 * model is the sum of log-probabilities, that of a scorer a weighted sum of scores. */
enum { SEQS = 3, ROWS = 40 };
static const int seq_len[SEQS] = {9, 24, 7};

typedef struct pass {
    rlhf_model *m;
    int first; /* what model_for_training takes: -1 drops nothing */
    uint64_t seed;
    double loss;
    float out[ROWS];
    int n;
} pass;

static void coef_of(void *user, int row, int n, const op_rows *found, float *coef) {
    (void)user, (void)row, (void)found;
    for (int i = 0; i < n; i++) coef[i] = 1;
}

static void pass_run(rlhf_ctx *ctx, void *arg) {
    pass *p = arg;
    rlhf_model *m = p->m;
    arena *ws = &m->ws;
    int32_t id[ROWS], target[ROWS];
    const int32_t *ids[SEQS];
    int row[ROWS], n = 0, score = m->c.head == RLHF_HEAD_SCORE;
    float slope[SEQS] = {1, -0.7f, 1.3f};
    arena_reset(ws);
    for (int i = 0; i < ROWS; i++) id[i] = token(i);
    for (int s = 0, at = 0; s < SEQS; at += seq_len[s++]) {
        ids[s] = id + at;
        for (int t = score ? seq_len[s] - 1 : 0; t < seq_len[s] - !score; t++) {
            row[n] = at + t;
            target[n++] = id[at + t + 1 - score];
        }
    }
    model_run run = model_batch(ws, SEQS, ids, seq_len, NULL);
    model_for_training(m, ws, &run, p->seed, p->first);
    model_forward(m, ws, &run);
    model_top top = model_top_fwd(m, ws, run.x, row, n);
    p->n = n;
    p->loss = 0;
    float *dh = arena_floats(ws, (size_t)n, (size_t)m->c.d);
    if (score) {
        model_scores(m, ws, &top, p->out);
        model_scores_bwd(m, ws, &top, slope, dh);
    } else {
        op_env e = {ctx, ws};
        op_weight w = model_head_weight(m, n);
        op_rows found = {.logp = p->out};
        op_vocab_run(&e, &w, n, top.h, target, 1, &found, coef_of, p, dh);
    }
    model_backward(m, ws, &run, model_top_bwd(m, ws, &top, dh, run.rows));
    for (int i = 0; i < n; i++) p->loss += (double)p->out[i] * (double)(score ? slope[i] : 1);
}

static pass pass_go(rlhf_model *m, uint64_t seed, int first) {
    pass p = {.m = m, .seed = seed, .first = first};
    if (m->g) memset(m->g, 0, m->n * sizeof *m->g);
    OK(m->ctx, test_call(m->ctx, pass_run, &p));
    return p;
}

static void lend_gradients(rlhf_model *m) { m->g = mem_zalloc(m->ctx, m->n, sizeof *m->g); }

static void drop(rlhf_model *m) {
    if (m->g) mem_free(m->g);
    m->g = NULL;
    rlhf_model_close(m);
}

static double largest(const double *x, size_t n) {
    double most = 0;
    for (size_t i = 0; i < n; i++) most = fmax(most, fabs(x[i]));
    return most;
}

/* ---- an adapter and the model it is merged into ---------------------------------------------- */

/* The gradients of A and B of one module follow from that of the whole matrix: with W + s B A they
 * are s B^T dW and s dW A^T. */
static void check_chain(const rlhf_model *m, const rlhf_model *whole, int module, int layer) {
    int p = model_modules[module].param, from, r = m->c.lora.r, cols = m->slot[p].cols;
    int rows = model_part_rows(&m->c, model_modules[module].part, m->slot[p].rows, &from);
    const float *a = model_w(m, model_modules[module].a, layer);
    const float *b = model_w(m, model_modules[module].b, layer);
    const float *dw = model_g(whole, p, layer) + (size_t)from * (size_t)cols;
    const float *got[2] = {model_g(m, model_modules[module].a, layer),
                           model_g(m, model_modules[module].b, layer)};
    double scale = (double)m->c.lora.alpha / (m->c.lora.rslora ? sqrt(r) : r);
    size_t n[2] = {(size_t)(r * cols), (size_t)(rows * r)};
    double *want[2] = {calloc(n[0], sizeof(double)), calloc(n[1], sizeof(double))};
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++)
            for (int k = 0; k < r; k++) {
                double d = scale * (double)dw[i * cols + j];
                want[0][k * cols + j] += d * (double)b[i * r + k];
                want[1][i * r + k] += d * (double)a[k * cols + j];
            }
    for (int h = 0; h < 2; h++) {
        double most = largest(want[h], n[h]);
        CHECK(most > 1e-3);
        for (size_t i = 0; i < n[h]; i++) CHECK_NEAR(got[h][i], want[h][i], 1e-3 * most);
        free(want[h]);
    }
}

/* Logits, losses and gradients of m's adapters against those of the merged copy. */
static void check_merged(rlhf_model *m) {
    rlhf_model *whole = copy_of(m, m->c.head);
    thaw(whole);
    CHECK(!whole->base && !whole->c.lora.r && m->base && m->c.lora.r);
    if (m->c.head == RLHF_HEAD_LM)
        for (int n = 7; n <= LONG; n += LONG - 7) {
            float *x = logits_of(m, n), *y = logits_of(whole, n), most = 0;
            for (int i = 0; i < n * VOCAB; i++) most = fmaxf(most, fabsf(y[i]));
            for (int i = 0; i < n * VOCAB; i++) CHECK_NEAR(x[i], y[i], 1e-5f * most);
            free(x);
            free(y);
        }
    lend_gradients(m);
    lend_gradients(whole);
    pass p = pass_go(m, 0, -1), q = pass_go(whole, 0, -1);
    CHECK_NEAR(p.loss, q.loss, 1e-5 * fabs(q.loss) + 1e-5);
    for (int i = 0; i < LORA_MODULES; i++)
        for (int l = 0; l < m->c.layers && (m->c.lora.on >> i & 1); l++)
            check_chain(m, whole, i, l);
    drop(whole);
}

/* Which of a family's matrices can have an adapter. */
static unsigned all_linear(const rlhf_model *m) {
    unsigned on = 0;
    for (const model_tensor *t = m->family->tensors; t->name; t++)
        if (model_module_of(t) >= 0) on |= 1u << model_module_of(t);
    return on;
}

/* An adapter to what `targets` names, to a language model or a scorer. */
static void merged_case(rlhf_model *base, rlhf_head head, const char *targets, model_lora lora,
                        unsigned on) {
    rlhf_model *m = copy_of(base, head);
    adapt(m, targets, lora);
    CHECK_EQ_I(m->c.lora.on, on);
    if (head == RLHF_HEAD_LM) same_logits(m, base, 9); /* B is zero: nothing has changed */
    fill_own(m, 0.3f);
    float *x = logits_of(base, 5), *y = head == RLHF_HEAD_LM ? logits_of(m, 5) : NULL;
    CHECK(!y || memcmp(x, y, 5 * VOCAB * sizeof *x) != 0);
    free(x);
    free(y);
    check_merged(m);
    drop(m);
}

TEST(adapter_and_merged) {
    const model_lora lora = {.r = 4, .alpha = 6}, root = {.r = 4, .alpha = 3, .rslora = 1};
    const model_lora one = {.r = 1, .alpha = 2};
    for (int c = 0; c < CONFIGS; c++) {
        rlhf_ctx *ctx = test_context("auto", 1);
        base_make(ctx, configs[c], '4', "base");
        rlhf_model *base = open_in(ctx, "base");
        unsigned all = all_linear(base);
        int kv = c == 0 || c == 3;
        merged_case(base, RLHF_HEAD_LM, "all-linear", lora, all);
        merged_case(base, RLHF_HEAD_SCORE, "all-linear", root, all);
        merged_case(base, RLHF_HEAD_LM, "auto", root,
                    kv ? 1u << LORA_QKV : 1u << LORA_Q | 1u << LORA_V);
        merged_case(base, RLHF_HEAD_SCORE, "all-linear", one, all);
        /* Each module by itself: what a wrong place of its rows would show in. */
        for (const model_tensor *t = base->family->tensors; t->name; t++) {
            char name[160];
            int i = model_module_of(t);
            if (i < 0) continue;
            snprintf(name, sizeof name, "%s", t->name);
            *strstr(name, ".weight") = 0;
            merged_case(base, RLHF_HEAD_LM, strstr(name, "%d.") + 3, one, 1u << i);
        }
        rlhf_model_close(base);
        test_remove(test_path("base"));
        CHECK_EQ_I(bases(ctx), 0);
        rlhf_close(ctx);
    }
}

/* GPT-2 has two matrices c_proj: the short name means both, a path one. */
TEST(names_of_targets) {
    rlhf_ctx *ctx = test_context("auto", 1);
    base_make(ctx, gpt2, '4', "base");
    rlhf_model *base = open_in(ctx, "base");
    const model_lora lora = {.r = 2, .alpha = 2};
    merged_case(base, RLHF_HEAD_LM, "c_proj", lora, 1u << LORA_O | 1u << LORA_DOWN);
    merged_case(base, RLHF_HEAD_LM, "mlp.c_proj", lora, 1u << LORA_DOWN);
    merged_case(base, RLHF_HEAD_LM, "c_attn,attn.c_proj", lora, 1u << LORA_QKV | 1u << LORA_O);
    static const char *const bad[] = {"proj", "q_proj", "wte", "", "lm_head", "attn"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        inside o = {.text = bad[i], .m = base, .lora = lora};
        CHECK_EQ_I(test_call(ctx, adapt_run, &o), RLHF_ERR_ARG);
        CHECK(strstr(rlhf_error(ctx), "targets") && strstr(rlhf_error(ctx), bad[i]));
        CHECK(!base->c.lora.r);
    }
    rlhf_model_close(base);
    rlhf_close(ctx);
}

/* ---- frozen weights -------------------------------------------------------------------------- */

static char *contents(const char *dir, const char *name, size_t *size) {
    char path[1200];
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

static void put(const char *dir, const char *name, const char *data, size_t size) {
    char path[1200];
    snprintf(path, sizeof path, "%s/%s", test_path(dir), name);
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(data, 1, size, f) == size);
    if (f) fclose(f);
}

static void same_file(const char *a, const char *b, const char *name) {
    size_t n, k;
    char *x = contents(a, name, &n), *y = contents(b, name, &k);
    if (!x || !y || n == 0) test_fail(__FILE__, __LINE__, "%s was not written", name);
    else if (n != k || memcmp(x, y, n) != 0)
        test_fail(__FILE__, __LINE__, "%s differs (%zu and %zu bytes)", name, n, k);
    free(x);
    free(y);
}

/* Shifts all data of a file of weights by a byte, for which the format allows a space more in the
 * header. */
static void misalign(const char *dir) {
    size_t n;
    char *x = contents(dir, "model.safetensors", &n), *y = calloc(n + 1, 1);
    size_t head = (unsigned char)x[0] | (size_t)(unsigned char)x[1] << 8;
    memcpy(y, x, 8 + head);
    y[8 + head] = ' ';
    memcpy(y + 9 + head, x + 8 + head, n - 8 - head);
    head++;
    y[0] = (char)(head & 255), y[1] = (char)(head >> 8);
    put(dir, "model.safetensors", y, n + 1);
    free(x);
    free(y);
}

/* Gradients of adapters, those of x through frozen weights with them. */
static void same_gradients(rlhf_model *a, rlhf_model *b) {
    CHECK_EQ_I(a->n, b->n);
    lend_gradients(a);
    lend_gradients(b);
    pass_go(a, 0, -1);
    pass_go(b, 0, -1);
    CHECK_BITS(a->g, b->g, a->n);
    mem_free(a->g);
    mem_free(b->g);
    a->g = b->g = NULL;
}

static void frozen_case(const char *config, char kind, int odd, int keep, int threads, int half) {
    const model_lora lora = {.r = 3, .alpha = 3};
    rlhf_ctx *ctx = context("auto", threads, half);
    base_make(ctx, config, kind, "base");
    base_make(ctx, config, kind, "even");
    if (odd) misalign("base");
    rlhf_model *m = open_in(ctx, "base"), *copy = copy_of(m, RLHF_HEAD_LM);
    rlhf_model *made = model_make(ctx, config, kind);
    CHECK(copy->base == m->base);
    CHECK_EQ_I(m->base->refs, 2);
    CHECK_EQ_I(m->n, 0);
    CHECK_EQ_I(model_hash(m), model_hash(made));
    m->base->keep_packed = keep;
    thaw(copy);
    CHECK_EQ_I(m->base->refs, 1);
    CHECK_EQ_I(model_hash(copy), model_hash(made));
    CHECK_BITS(copy->w, made->w, made->n);
    same_logits(m, copy, 1);
    same_logits(m, copy, 9);
    same_logits(m, copy, LONG);
    /* What is saved again: all of it as it was read. */
    OK(ctx, rlhf_model_save(m, NULL, test_path("again")));
    same_file("again", "even", "model.safetensors");
    same_file("again", "even", "config.json");
    OK(ctx, rlhf_model_save(copy, NULL, test_path("thawed")));
    same_file("thawed", "even", "model.safetensors");
    /* Adapters on these weights and on the same numbers as F32. */
    memset(made->stored, 0, model_tensors(made) * (size_t)made->c.layers);
    OK(ctx, rlhf_model_save(made, NULL, test_path("floats")));
    rlhf_model *floats = open_in(ctx, "floats");
    CHECK(floats->base != m->base);
    floats->base->keep_packed = !keep;
    adapt(m, "all-linear", lora);
    adapt(floats, "all-linear", lora);
    fill_own(m, 0.3f);
    fill_own(floats, 0.3f);
    same_gradients(m, floats);
    rlhf_model *models[] = {m, copy, made, floats};
    for (int i = 0; i < 4; i++) rlhf_model_close(models[i]);
    CHECK_EQ_I(bases(ctx), 0);
    rlhf_close(ctx);
    static const char *const dirs[] = {"base", "even", "again", "thawed", "floats"};
    for (int i = 0; i < 5; i++) test_remove(test_path(dirs[i]));
}

TEST(mapped_as_thawed) {
    for (int c = 0; c < CONFIGS; c++)
        for (int k = 0; k < 3; k++)
            for (int odd = 0; odd < 2; odd++) {
                int failed = test_failures;
                for (int half = 0; half < 2; half++)
                    frozen_case(configs[c], "4hb"[k], odd, (c + k + odd) % 2, 1 + 2 * (k % 2),
                                half);
                if (test_failures > failed)
                    printf("\n    (model %d, dtype %d, odd %d)", c, k, odd);
            }
}

/* A matrix of more rows than are widened at a time: the sum over them is one chain. */
TEST(matrices_in_blocks) {
    CHECK(op_widen_count(64) < 9001);
    frozen_case(tall, 'b', 0, 0, 1, 0);
    frozen_case(tall, 'h', 1, 1, 3, 0);
    frozen_case(tall, 'h', 0, 0, 1, 1);
}

/* Losses and gradients of adapters on mapped weights, for any kernels and threads. */
TEST(kernels_and_threads) {
    static const int threads[] = {1, 2, 3, 5};
    for (int c = 0; c < CONFIGS; c++) {
        float *g = NULL, out[ROWS];
        for (int t = K_TABLES - 1; t >= 0; t--)
            for (int i = 0; i < (t ? 1 : 4); i++) {
                if (!k_tables[t]->available()) continue;
                rlhf_ctx *ctx = context(k_tables[t]->name, threads[i], 0);
                base_make(ctx, configs[c], "bh4"[c % 3], "base");
                rlhf_model *m = open_in(ctx, "base");
                adapt(m, "all-linear", (model_lora){.r = 5, .alpha = 3, .dropout = 0.2f});
                fill_own(m, 0.3f);
                lend_gradients(m);
                pass p = pass_go(m, 3, 0);
                if (!g) {
                    g = malloc(m->n * sizeof *g);
                    memcpy(g, m->g, m->n * sizeof *g);
                    memcpy(out, p.out, sizeof out);
                }
                CHECK_BITS(p.out, out, p.n);
                CHECK_BITS(m->g, g, m->n);
                drop(m);
                rlhf_close(ctx);
                test_remove(test_path("base"));
            }
        free(g);
    }
}

/* One base for all models of the same files, whatever the order in which they go. */
TEST(one_base_for_a_directory) {
    for (int order = 0; order < 6; order++) {
        rlhf_ctx *ctx = test_context("auto", 1);
        base_make(ctx, order % 2 ? gpt2 : llama, 'b', "base");
        int64_t live = test_live();
        rlhf_model *m[3] = {open_in(ctx, "base"), open_in(ctx, "base"), NULL};
        CHECK(m[0]->base == m[1]->base && m[0]->base == ctx->bases);
        m[2] = copy_of(m[1], RLHF_HEAD_SCORE);
        CHECK(m[2]->base == m[0]->base);
        CHECK_EQ_I(m[0]->base->refs, 3);
        CHECK_EQ_I(bases(ctx), 1);
        /* One is trained: the others keep what they have. */
        float *before = logits_of(m[0], 6);
        thaw(m[1]);
        fill_own(m[1], 0.1f);
        CHECK_EQ_I(m[0]->base->refs, 2);
        float *after = logits_of(m[0], 6), *other = logits_of(m[1], 6);
        CHECK_BITS(after, before, 6 * VOCAB);
        CHECK(memcmp(other, before, 6 * VOCAB * sizeof *other) != 0);
        free(before), free(after), free(other);
        int first = order % 3, second = (first + 1 + order / 3) % 3;
        rlhf_model_close(m[first]);
        rlhf_model_close(m[second]);
        rlhf_model_close(m[3 - first - second]);
        CHECK_EQ_I(bases(ctx), 0);
        CHECK_EQ_I(test_live(), live);
        rlhf_close(ctx);
    }
}

/* Files that were replaced are other files, although the directory has the same name. */
TEST(a_directory_that_changes) {
    rlhf_ctx *ctx = test_context("auto", 1);
    base_make(ctx, llama, '4', "base");
    rlhf_model *m = open_in(ctx, "base"), *other = copy_of(m, RLHF_HEAD_LM);
    uint64_t old = model_hash(m);
    thaw(other);
    fill_own(other, 0.2f);
    OK(ctx, rlhf_model_save(other, NULL, test_path("base")));
    rlhf_model *now = open_in(ctx, "base");
    CHECK(now->base != m->base);
    CHECK(model_hash(now) == model_hash(other) && model_hash(m) == old && old != model_hash(now));
    rlhf_model_close(m);
    rlhf_model_close(now);
    rlhf_model_close(other);
    rlhf_close(ctx);
}


/* ---- directories of adapters ----------------------------------------------------------------- */

/* Changes members of a JSON file of the test's folder: `changes` is an object in which null takes a
 * member away. */
static void edit(const char *dir, const char *name, const char *changes) {
    char text[1024];
    size_t n;
    snprintf(text, sizeof text, "%s", changes);
    for (char *c = text; *c; c++)
        if (*c == '\'') *c = '"';
    char *old = contents(dir, name, &n);
    json_t *j = json_loads(old, 0, NULL), *with = json_loads(text, 0, NULL), *value;
    const char *key;
    CHECK(j && with);
    json_object_foreach(with, key, value) {
        if (json_is_null(value)) json_object_del(j, key);
        else json_object_set(j, key, value);
    }
    char *new = json_dumps(j, JSON_INDENT(1));
    put(dir, name, new, strlen(new));
    free(new);
    free(old);
    json_decref(j);
    json_decref(with);
}

/* An adapter with random weights in the folder "adapter", on "base"; the model itself. */
static rlhf_model *adapter_make(rlhf_ctx *ctx, const char *config, rlhf_head head,
                                model_lora lora) {
    base_make(ctx, config, 'b', "base");
    rlhf_model *base = open_in(ctx, "base"), *m = copy_of(base, head);
    adapt(m, "all-linear", lora);
    fill_own(m, 0.3f);
    m->score_trained = head == RLHF_HEAD_SCORE;
    if (m->score_trained) m->score_mean = 0.25f, m->score_std = 1.5f;
    OK(ctx, rlhf_model_save(m, NULL, test_path("adapter")));
    rlhf_model_close(base);
    return m;
}

static void no_adapter(int line, rlhf_ctx *ctx, rlhf_status want, const char *file,
                       const char *word) {
    rlhf_model *m = NULL;
    int64_t live = test_live();
    rlhf_status status = rlhf_model_open(ctx, test_path("adapter"), &m);
    const char *text = rlhf_error(ctx);
    if (status != want || m || !strstr(text, file) || !strstr(text, word))
        test_fail(__FILE__, line, "status %d (expected %d), \"%s\" (expected %s and %s)",
                  (int)status, (int)want, text, file, word);
    CHECK_EQ_I(test_live(), live);
    CHECK_EQ_I(ctx->n_defer, 0);
    rlhf_model_close(m);
}

TEST(adapter_directory) {
    for (int c = 0; c < CONFIGS; c++)
        for (int head = 0; head < 2; head++) {
            rlhf_ctx *ctx = test_context("auto", 1);
            model_lora lora = {.r = 3, .alpha = 5, .rslora = head, .dropout = 0.125f};
            rlhf_model *m = adapter_make(ctx, configs[c], (rlhf_head)head, lora);
            rlhf_model *back = open_in(ctx, "adapter");
            CHECK(back->base == m->base);
            CHECK_EQ_I(back->n, m->n);
            CHECK_BITS(back->w, m->w, m->n);
            CHECK_EQ_I(back->c.lora.on, m->c.lora.on);
            CHECK(back->c.lora.rslora == head && back->c.lora.r == 3);
            CHECK_NEAR(back->c.lora.alpha, 5, 0);
            CHECK_NEAR(back->c.lora.dropout, 0.125, 0);
            if (head) {
                int32_t ids[9];
                float x = 0, y = 1;
                for (int i = 0; i < 9; i++) ids[i] = token(i);
                OK(ctx, rlhf_model_score(m, ids, 9, &x));
                OK(ctx, rlhf_model_score(back, ids, 9, &y));
                CHECK_BITS(&x, &y, 1);
                CHECK(back->score_trained);
                CHECK_NEAR(back->score_std, 1.5, 0);
            } else same_logits(m, back, 9);
            OK(ctx, rlhf_model_save(back, NULL, test_path("again")));
            same_file("adapter", "again", "adapter_model.safetensors");
            same_file("adapter", "again", "adapter_config.json");
            CHECK(access(test_path("again/model.safetensors"), F_OK) != 0);
            rlhf_model_close(m);
            rlhf_model_close(back);
            rlhf_close(ctx);
            test_remove(test_path("again"));
            test_remove(test_path("adapter"));
            test_remove(test_path("base"));
        }
}

/* One tensor of a file of weights: its numbers, a block, and its shape; null if it is not there. */
static float *tensor_of(const char *dir, const char *name, int shape[2]) {
    size_t size, n = 0;
    char *x = contents(dir, "adapter_model.safetensors", &size);
    memcpy(&n, x, 8);
    json_t *header = json_loadb(x + 8, n, 0, NULL), *t = json_object_get(header, name);
    int64_t from = json_integer_value(json_array_get(json_object_get(t, "data_offsets"), 0));
    float *out = NULL;
    for (int i = 0; i < 2; i++)
        shape[i] = (int)json_integer_value(
            json_array_get(json_object_get(t, "shape"), (size_t)i));
    if (t) {
        out = calloc((size_t)(shape[0] * shape[1]), sizeof *out);
        memcpy(out, x + 8 + n + from, (size_t)(shape[0] * shape[1]) * sizeof *out);
    }
    json_decref(header);
    free(x);
    return out;
}

/* PEFT's names and shapes, A [r][in] and B [out][r]; B's rows in the order that the family's file
 * has: in gpt_neox query, key and value of each head. */
TEST(files_as_peft_has_them) {
    static const struct {
        const char *config, *name;
        int module, in, out, heads;
    } cases[] = {
        {gpt2, "transformer.h.1.attn.c_attn", LORA_QKV, 24, 72, 0},
        {gpt2, "transformer.h.1.mlp.c_fc", LORA_FC, 24, 40, 0},
        {gpt2, "transformer.h.1.mlp.c_proj", LORA_DOWN, 40, 24, 0},
        {llama, "model.layers.1.self_attn.k_proj", LORA_K, 24, 12, 0},
        {llama, "model.layers.1.mlp.gate_proj", LORA_GATE, 24, 36, 0},
        {neox, "gpt_neox.layers.1.attention.query_key_value", LORA_QKV, 24, 72, 3},
        {neox, "gpt_neox.layers.1.mlp.dense_4h_to_h", LORA_DOWN, 40, 24, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rlhf_ctx *ctx = test_context("auto", 1);
        rlhf_model *m = adapter_make(ctx, cases[i].config, RLHF_HEAD_SCORE,
                                     (model_lora){.r = 3, .alpha = 5});
        char name[160];
        int shape[2];
        snprintf(name, sizeof name, "base_model.model.%s.lora_A.weight", cases[i].name);
        float *a = tensor_of("adapter", name, shape);
        CHECK(a && shape[0] == 3 && shape[1] == cases[i].in);
        if (a) CHECK_BITS(a, model_w(m, model_modules[cases[i].module].a, 1), 3 * cases[i].in);
        *strstr(name, "lora_A") = 0;
        strcat(name, "lora_B.weight");
        float *b = tensor_of("adapter", name, shape);
        CHECK(b && shape[0] == cases[i].out && shape[1] == 3);
        for (int row = 0; b && row < cases[i].out; row++) {
            int at = row, hd = cases[i].heads ? cases[i].out / 3 / cases[i].heads : 1;
            int head = row / (3 * hd), part = row / hd % 3;
            if (cases[i].heads) at = part * cases[i].out / 3 + head * hd + row % hd;
            CHECK_BITS(b + row * 3, model_w(m, model_modules[cases[i].module].b, 1) + at * 3, 3);
        }
        float *score = tensor_of("adapter", "base_model.model.score.weight", shape);
        CHECK(score && shape[0] == 1 && shape[1] == 24);
        if (score) CHECK_BITS(score, model_w(m, P_SCORE, 0), 24);
        free(a), free(b), free(score);
        rlhf_model_close(m);
        rlhf_close(ctx);
        test_remove(test_path("adapter"));
        test_remove(test_path("base"));
    }
}

/* A head that nobody has trained stays such. */
TEST(adapter_without_a_head) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_model *m = adapter_make(ctx, llama, RLHF_HEAD_SCORE, (model_lora){.r = 2, .alpha = 2});
    const int32_t ids[3] = {token(0), token(1), token(2)};
    float score = 0;
    m->score_trained = 0;
    OK(ctx, rlhf_model_save(m, NULL, test_path("adapter")));
    rlhf_model *back = open_in(ctx, "adapter");
    CHECK(back->c.head == RLHF_HEAD_SCORE && !back->score_trained);
    CHECK_EQ_I(rlhf_model_score(back, ids, 3, &score), RLHF_ERR_ARG);
    rlhf_model_close(m);
    rlhf_model_close(back);
    rlhf_close(ctx);
}

/* A list of names and one name mean the same; what a member would change is refused. */
TEST(adapter_configs) {
    static const struct {
        const char *changes, *word;
        rlhf_status status;
    } cases[] = {
        {"{'use_dora':true}", "use_dora", RLHF_ERR_UNSUPPORTED},
        {"{'rank_pattern':{'q_proj':4}}", "rank_pattern", RLHF_ERR_UNSUPPORTED},
        {"{'alpha_pattern':{'q_proj':4}}", "alpha_pattern", RLHF_ERR_UNSUPPORTED},
        {"{'layers_to_transform':[0]}", "layers_to_transform", RLHF_ERR_UNSUPPORTED},
        {"{'bias':'lora_only'}", "bias", RLHF_ERR_UNSUPPORTED},
        {"{'peft_type':'IA3'}", "peft_type", RLHF_ERR_UNSUPPORTED},
        {"{'peft_type':null}", "peft_type", RLHF_ERR_FORMAT},
        {"{'modules_to_save':['embed_tokens']}", "modules_to_save", RLHF_ERR_UNSUPPORTED},
        {"{'modules_to_save':['score']}", "modules_to_save", RLHF_ERR_UNSUPPORTED},
        {"{'target_modules':['q_proj','c_attn']}", "c_attn", RLHF_ERR_ARG},
        {"{'target_modules':'embed_tokens'}", "embed_tokens", RLHF_ERR_ARG},
        {"{'target_modules':[]}", "target_modules", RLHF_ERR_FORMAT},
        {"{'target_modules':null}", "target_modules", RLHF_ERR_FORMAT},
        {"{'target_modules':[3]}", "target_modules", RLHF_ERR_FORMAT},
        {"{'task_type':'SEQ_2_SEQ_LM'}", "task_type", RLHF_ERR_FORMAT},
        {"{'r':0}", "\"r\"", RLHF_ERR_FORMAT},
        {"{'r':'3'}", "\"r\"", RLHF_ERR_FORMAT},
        {"{'lora_alpha':'3'}", "lora_alpha", RLHF_ERR_FORMAT},
        {"{'base_model_name_or_path':null}", "base_model_name_or_path", RLHF_ERR_FORMAT},
        {"{'base_model_name_or_path':'no/such'}", "base_model_name_or_path", RLHF_ERR_IO}};
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_model *m = adapter_make(ctx, llama, RLHF_HEAD_LM, (model_lora){.r = 3, .alpha = 5});
    size_t n;
    char *good = contents("adapter", "adapter_config.json", &n);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        edit("adapter", "adapter_config.json", cases[i].changes);
        no_adapter(__LINE__, ctx, cases[i].status, "adapter/adapter_config.json", cases[i].word);
        put("adapter", "adapter_config.json", good, n);
    }
    /* What changes nothing is read: neutral values, null, members that are unknown. */
    edit("adapter", "adapter_config.json",
         "{'use_dora':false,'rank_pattern':{},'bias':'none','peft_version':'0.17','revision':1,"
         "'target_modules':'all-linear','base_model_name_or_path':'../base'}");
    rlhf_model *back = open_in(ctx, "adapter");
    CHECK(back->base == m->base); /* seen from the adapter, and the same files */
    same_logits(m, back, 9);
    rlhf_model_close(back);
    /* What PEFT's file writes as null. */
    char *nulls = contents("adapter", "adapter_config.json", &n);
    nulls[strlen(nulls) - 1] = 0; /* the closing brace */
    char text[4096];
    snprintf(text, sizeof text,
             "%s,\"layers_to_transform\":null,\"modules_to_save\":null,\"use_dora\":null}", nulls);
    put("adapter", "adapter_config.json", text, strlen(text));
    back = open_in(ctx, "adapter");
    if (back) same_logits(m, back, 9);
    rlhf_model_close(back);
    free(nulls);
    free(good);
    rlhf_model_close(m);
    rlhf_close(ctx);
}

typedef struct damage {
    rlhf_model *m;
    int what;
} damage;

/* Writes the adapter's tensors with one thing wrong. */
static void damage_run(rlhf_ctx *ctx, void *arg) {
    const damage *o = arg;
    int n;
    ckpt_tensor *list = ckpt_adapter_tensors(o->m, &n), *last = list + n - 1;
    if (o->what == 0) n--;
    if (o->what == 1) snprintf(last->name, sizeof last->name, "base_model.model.lora_A.weight");
    if (o->what == 2) last->rows--;
    if (o->what == 3) list->cols--;
    if (o->what == 4) list->transposed = 1;
    char *dir = mem_temp(mem_strdup(ctx, test_path("adapter")));
    ckpt_write(ctx, ckpt_path(ctx, dir, "adapter_model.safetensors"), list, n);
    mem_free(list);
    if (o->what != 5) return;
    size_t size;
    char *x = contents("adapter", "adapter_model.safetensors", &size);
    put("adapter", "adapter_model.safetensors", x, size - 4);
    free(x);
}

TEST(adapter_tensors) {
    static const char *const words[] = {"is missing", "is missing", "has shape", "has shape",
                                        "has shape", "truncated"};
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_model *m = adapter_make(ctx, neox, RLHF_HEAD_LM, (model_lora){.r = 3, .alpha = 5});
    for (int i = 0; i < 6; i++) {
        damage d = {m, i};
        OK(ctx, test_call(ctx, damage_run, &d));
        no_adapter(__LINE__, ctx, RLHF_ERR_FORMAT, "adapter/adapter_model.safetensors", words[i]);
        if (i < 5) no_adapter(__LINE__, ctx, RLHF_ERR_FORMAT, "lora_", words[i]);
    }
    /* More tensors than the configuration speaks of. */
    OK(ctx, rlhf_model_save(m, NULL, test_path("adapter")));
    edit("adapter", "adapter_config.json", "{'target_modules':['dense']}");
    no_adapter(__LINE__, ctx, RLHF_ERR_FORMAT, "adapter/adapter_model.safetensors", "unexpected");
    /* Fewer, of another rank; no file; a base that is an adapter, or has no weights. */
    edit("adapter", "adapter_config.json", "{'target_modules':'all-linear','r':4}");
    no_adapter(__LINE__, ctx, RLHF_ERR_FORMAT, "adapter/adapter_model.safetensors", "has shape");
    edit("adapter", "adapter_config.json", "{'r':3}");
    unlink(test_path("adapter/adapter_model.safetensors"));
    no_adapter(__LINE__, ctx, RLHF_ERR_IO, "adapter/adapter_model.safetensors", "");
    OK(ctx, rlhf_model_save(m, NULL, test_path("other")));
    edit("adapter", "adapter_config.json", "{'base_model_name_or_path':'../other'}");
    no_adapter(__LINE__, ctx, RLHF_ERR_UNSUPPORTED, "adapter/adapter_config.json",
               "adapter itself");
    edit("adapter", "adapter_config.json", "{'base_model_name_or_path':'.'}");
    no_adapter(__LINE__, ctx, RLHF_ERR_IO, "", "");
    rlhf_model_close(m);
    rlhf_close(ctx);
}

/* A scorer's head is found whichever head its files were opened for before. */
TEST(heads_of_one_base) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_model *m = adapter_make(ctx, qwen2, RLHF_HEAD_LM, (model_lora){.r = 2, .alpha = 2});
    rlhf_model *scorer = copy_of(m, RLHF_HEAD_SCORE);
    thaw(scorer);
    fill_own(scorer, 0.5f);
    scorer->score_trained = 1;
    OK(ctx, rlhf_model_save(scorer, NULL, test_path("rm")));
    edit("adapter", "adapter_config.json", "{'base_model_name_or_path':'../rm'}");
    rlhf_model *lm = open_in(ctx, "adapter"), *rm = open_in(ctx, "rm");
    CHECK(lm->c.head == RLHF_HEAD_LM && rm->c.head == RLHF_HEAD_SCORE);
    CHECK(rm->score_trained);
    CHECK_EQ_I(model_hash(rm), model_hash(scorer));
    rlhf_model *models[] = {m, scorer, lm, rm};
    for (int i = 0; i < 4; i++) rlhf_model_close(models[i]);
    rlhf_close(ctx);
}

/* A base whose config.json changes while models use it. */
TEST(a_config_that_changes) {
    rlhf_ctx *ctx = test_context("auto", 1);
    base_make(ctx, llama, '4', "base");
    rlhf_model *m = open_in(ctx, "base"), *other = NULL;
    edit("base", "config.json", "{'num_hidden_layers':3}");
    CHECK_EQ_I(rlhf_model_open(ctx, test_path("base"), &other), RLHF_ERR_FORMAT);
    edit("base", "config.json", "{'num_hidden_layers':2,'intermediate_size':35}");
    CHECK_EQ_I(rlhf_model_open(ctx, test_path("base"), &other), RLHF_ERR_FORMAT);
    edit("base", "config.json", "{'num_hidden_layers':1,'intermediate_size':36}");
    CHECK_EQ_I(rlhf_model_open(ctx, test_path("base"), &other), RLHF_ERR_FORMAT);
    rlhf_model_close(m);
    rlhf_close(ctx);
}

/* ---- dropout --------------------------------------------------------------------------------- */

typedef struct dropped {
    float p;
    uint64_t seed;
    int rows, k, zeros;
    float out[64 * 50];
} dropped;

static void dropped_run(rlhf_ctx *ctx, void *arg) {
    dropped *o = arg;
    arena ws = {.ctx = ctx};
    uint64_t key[64];
    for (int i = 0; i < o->rows; i++) key[i] = (uint64_t)(i / 8) << 44 | (uint64_t)(i % 8) << 22;
    op_env e = {ctx, &ws};
    op_weight w = {.k = o->k, .n = 1, .drop = {o->p, o->seed, key}};
    float *x = arena_floats(&ws, (size_t)o->rows, (size_t)o->k);
    for (int i = 0; i < o->rows * o->k; i++) x[i] = 3;
    memcpy(o->out, op_dropped(&e, &w, o->rows, x), sizeof *x * (size_t)(o->rows * o->k));
    for (int i = 0; i < o->rows * o->k; i++) {
        CHECK_NEAR(x[i], 3, 0); /* not in place: others read it too */
        o->zeros += o->out[i] == 0;
        if (o->out[i] != 0) CHECK_NEAR(o->out[i], 3 / (1 - o->p), 1e-5);
    }
    arena_free(&ws);
}

/* The share of zeros, by six standard deviations; the rest is larger by as much. */
TEST(share_of_zeros) {
    static const float share[] = {0.05f, 0.3f, 0.9f};
    rlhf_ctx *ctx = test_context("auto", 1);
    for (int i = 0; i < 3; i++) {
        static dropped a, b;
        a = (dropped){.p = share[i], .seed = 11, .rows = 64, .k = 50};
        b = a;
        b.seed = 12;
        OK(ctx, test_call(ctx, dropped_run, &a));
        OK(ctx, test_call(ctx, dropped_run, &b));
        double n = 64 * 50, p = (double)share[i];
        CHECK_NEAR(a.zeros, n * p, 6 * sqrt(n * p * (1 - p)));
        CHECK_NEAR(b.zeros, n * p, 6 * sqrt(n * p * (1 - p)));
        CHECK(memcmp(a.out, b.out, sizeof a.out) != 0);
        CHECK(memcmp(a.out, a.out + 50, 50 * sizeof *a.out) != 0); /* rows differ */
    }
    rlhf_close(ctx);
}

/* The gradient under dropout in a random direction against the difference of losses: a mask that is
 * another one backward would show. */
TEST(gradients_under_dropout) {
    for (int c = 0; c < CONFIGS; c++)
        for (int again = 0; again < 2; again++) {
            rlhf_ctx *ctx = test_context("auto", 1);
            model_lora lora = {.r = 4, .alpha = 6, .dropout = 0.4f};
            rlhf_model *m = adapter_make(ctx, configs[c], RLHF_HEAD_LM, lora);
            m->recompute = again;
            lend_gradients(m);
            double with = pass_go(m, 5, 0).loss, without = pass_go(m, 5, -1).loss;
            CHECK(fabs(with - without) > 1e-2);
            CHECK_NEAR(pass_go(m, 5, 0).loss, with, 0);
            CHECK(pass_go(m, 6, 0).loss != with);
            CHECK(pass_go(m, 5, 1).loss != with);
            pass_go(m, 5, 0);
            float *w = calloc(m->n, sizeof *w), *v = calloc(m->n, sizeof *v);
            double slope = 0, h = 0.01, loss[2];
            memcpy(w, m->w, m->n * sizeof *w);
            for (size_t i = 0; i < m->n; i++) {
                v[i] = 0.1f * (float)(2 * rng_uniform(4, 5, i) - 1);
                slope += (double)v[i] * (double)m->g[i];
            }
            for (int s = 0; s < 2; s++) {
                for (size_t i = 0; i < m->n; i++) m->w[i] = w[i] + (float)(s ? -h : h) * v[i];
                m->version++;
                loss[s] = pass_go(m, 5, 0).loss;
            }
            double want = (loss[0] - loss[1]) / (2 * h);
            CHECK(fabs(want) > 0.05);
            CHECK_NEAR(slope, want, 1e-2 * fabs(want) + 2e-3);
            free(w);
            free(v);
            drop(m);
            rlhf_close(ctx);
            test_remove(test_path("adapter"));
            test_remove(test_path("base"));
        }
}

/* ---- trainers -------------------------------------------------------------------------------- */

typedef enum stage { SFT, RM, PPO } stage;

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

static void data_new(rlhf_ctx *ctx, void *arg) {
    static const rlhf_data_kind kinds[] = {RLHF_DATA_SFT, RLHF_DATA_PREFERENCE, RLHF_DATA_PROMPT};
    inside *o = arg;
    rlhf_dataset *d = o->d = mem_zalloc(ctx, 1, sizeof *d);
    d->ctx = d->store.ctx = ctx;
    d->config = rlhf_data_config_default(kinds[o->kind]);
    d->record = arena_alloc(&d->store, (size_t)o->n * sizeof *d->record);
    for (d->n = 0; d->n < o->n; d->n++) {
        uint64_t key = 2 * (uint64_t)d->n;
        int ends = o->kind != PPO, len = 3 + (int)(rng_u64(2, key, 0) % 12);
        data_record *r = d->record + d->n;
        *r = (data_record){.line = "{}", .prompt = "", .weight = 1};
        r->a = seq_new(d, key, ends ? len : 1 + d->n % 5, 1 + d->n % 3, ends);
        if (o->kind == RM) r->b = seq_new(d, key + 1, 3 + d->n % 7, 1, 1);
    }
}

typedef union config {
    train_config c;
    rlhf_sft_config sft;
    rlhf_rm_config rm;
    rlhf_ppo_config ppo;
} config;

static config config_default(stage s) {
    config c;
    if (s == SFT) c.sft = rlhf_sft_config_default();
    else if (s == RM) c.rm = rlhf_rm_config_default();
    else c.ppo = rlhf_ppo_config_default();
    c.c.learning_rate = 3e-3;
    c.c.logging_steps = 1;
    c.c.per_device_train_batch_size = 4;
    c.c.use_peft = 1;
    c.c.lora_r = 3;
    c.c.lora_dropout = 0.25;
    c.c.lora_target_modules = "all-linear";
    if (s == RM) c.rm.normalize_samples = 8, c.rm.response_length = 4;
    if (s == PPO) {
        c.ppo.batch_size = 8;
        c.ppo.response_length = 6;
        c.ppo.num_ppo_epochs = c.ppo.num_mini_batches = 2;
    }
    return c;
}

static rlhf_status judge(void *user, const rlhf_sample *s, int n, float *reward) {
    (void)user;
    for (int i = 0; i < n; i++) {
        int small = 0;
        for (int k = 0; k < s[i].n_completion; k++) small += s[i].completion_ids[k] < VOCAB / 2;
        reward[i] = (float)small / (float)s[i].n_completion;
    }
    return RLHF_OK;
}

/* A run on the folder `from` with all that belongs to it. */
typedef struct lab {
    stage stage;
    const char *from;
    rlhf_ctx *ctx;
    rlhf_model *lm, *m, *reward; /* m: what is trained; reward may be null */
    rlhf_dataset *train;
    int eval; /* of what is trained on */
    config config;
    rlhf_trainer *t;
} lab;

/* A stage on a folder; progress may stop it where `user` says. */
static lab lab_hooked(stage s, const char *from, int threads,
                      int (*progress)(void *user, const rlhf_progress *p), void *user) {
    rlhf_options o = rlhf_options_default();
    lab l = {.stage = s, .from = from, .config = config_default(s)};
    o.threads = threads;
    o.hooks = test_hooks();
    o.hooks.progress = progress;
    o.hooks.user = user;
    OK(l.ctx, rlhf_open(&l.ctx, &o));
    return l;
}

static lab lab_new(stage s, const char *from, int threads) {
    return lab_hooked(s, from, threads, NULL, NULL);
}

static void models_open(lab *l) {
    l->m = open_in(l->ctx, l->from);
    l->lm = l->stage == RM ? open_in(l->ctx, "base") : l->m;
    if (l->stage != RM || l->m->c.head == RLHF_HEAD_SCORE) return;
    rlhf_model_close(l->m);
    l->m = copy_of(l->lm, RLHF_HEAD_SCORE);
}

static void models_close(lab *l) {
    if (l->m != l->lm) rlhf_model_close(l->m);
    rlhf_model_close(l->lm);
}

static void lab_models(lab *l) {
    inside data = {.kind = (int)l->stage, .n = 24};
    models_open(l);
    OK(l->ctx, test_call(l->ctx, data_new, &data));
    l->train = data.d;
}

static rlhf_status lab_open(lab *l) {
    const config *c = &l->config;
    rlhf_dataset *eval = l->eval ? l->train : NULL;
    if (l->stage == SFT) return rlhf_sft_open(l->m, NULL, l->train, eval, &c->sft, &l->t);
    if (l->stage == RM) return rlhf_rm_open(l->m, l->lm, NULL, l->train, eval, &c->rm, &l->t);
    return rlhf_ppo_open(l->m, NULL, l->train, l->reward, l->reward ? NULL : judge, NULL, &c->ppo,
                         &l->t);
}

static void lab_start(lab *l) {
    lab_models(l);
    OK(l->ctx, lab_open(l));
}

static void lab_step(lab *l, int steps) {
    for (int i = 0; i < steps; i++) OK(l->ctx, rlhf_trainer_step(l->t));
}

static void lab_close(lab *l) {
    rlhf_trainer_close(l->t);
    rlhf_dataset_close(l->train);
    models_close(l);
    rlhf_model_close(l->reward);
    CHECK_EQ_I(bases(l->ctx), 0);
    rlhf_close(l->ctx);
}

static void base_for_labs(const char *text) {
    rlhf_ctx *ctx = test_context("auto", 1);
    base_make(ctx, text, 'b', "base");
    rlhf_close(ctx);
}

/* What two steps end in. */
typedef struct outcome {
    uint64_t hash, value;
    double loss[2], eval;
} outcome;

static void eval_run(rlhf_ctx *ctx, void *arg) {
    rlhf_trainer *t = arg;
    (void)ctx;
    arena_reset(&t->ws);
    t->ops->eval(t);
}

static outcome outcome_of(lab *l, int steps) {
    outcome o = {0};
    lab_start(l);
    for (int i = 0; i < steps; i++) {
        lab_step(l, 1);
        o.loss[i % 2] = rlhf_trainer_metric(l->t, l->stage == PPO ? "loss/policy_avg" : "loss");
    }
    o.hash = model_hash(l->m);
    if (l->eval) OK(l->ctx, test_call(l->ctx, eval_run, l->t));
    if (l->eval) o.eval = rlhf_trainer_metric(l->t, "eval_loss");
    if (l->stage == PPO) o.value = model_hash(l->t->value);
    lab_close(l);
    return o;
}

/* Neither the cut of a step into batches nor threads change what adapters do not see. */
TEST(dropout_and_batches) {
    static const int per[] = {12, 1, 4, 6, 3};
    for (int s = SFT; s <= PPO; s++)
        for (int c = s; c < CONFIGS; c += 3) {
            base_for_labs(configs[c]);
            outcome whole = {0};
            for (int i = 0; i < 5; i++) {
                lab l = lab_new((stage)s, "base", i % 2 ? 3 : 1);
                l.config.c.per_device_train_batch_size = per[i];
                if (s != PPO) l.config.c.gradient_accumulation_steps = 12 / per[i];
                outcome o = outcome_of(&l, 2);
                if (i == 0) whole = o;
                CHECK(o.hash == whole.hash && o.value == whole.value);
                CHECK_NEAR(o.loss[1], whole.loss[1], 0);
            }
            lab l = lab_new((stage)s, "base", 1);
            l.config.c.per_device_train_batch_size = 12;
            l.config.c.lora_dropout = 0;
            outcome none = outcome_of(&l, 2);
            CHECK((none.hash == whole.hash) == (s == PPO)); /* PPO drops nothing */
            test_remove(test_path("base"));
        }
}

/* With weights that stay the loss is the same in each step, unless something is dropped, and in no
 * evaluation is. */
TEST(dropout_differs_between_steps) {
    for (int s = SFT; s <= RM; s++) {
        double eval = 0;
        for (int p = 0; p < 2; p++) {
            rlhf_ctx *ctx = test_context("auto", 1);
            rlhf_model *m = adapter_make(ctx, gpt2, s == RM ? RLHF_HEAD_SCORE : RLHF_HEAD_LM,
                                         (model_lora){.r = 3, .alpha = 3});
            rlhf_model_close(m);
            rlhf_close(ctx);
            lab l = lab_new((stage)s, "adapter", 1);
            l.config.c.learning_rate = 0;
            l.config.c.shuffle_dataset = 0;
            l.config.c.num_train_epochs = 2;
            l.config.c.per_device_train_batch_size = 24;
            l.config.c.lora_dropout = p ? 0.3 : 0;
            l.eval = 1;
            outcome o = outcome_of(&l, 2);
            if (p) CHECK_NEAR(o.eval, eval, 0);
            eval = o.eval;
            CHECK(o.eval > 0 && (o.loss[0] == o.loss[1]) == !p);
            test_remove(test_path("adapter"));
            test_remove(test_path("base"));
        }
    }
}

TEST(ppo_drops_nothing) {
    base_for_labs(llama);
    lab l = lab_new(PPO, "base", 1);
    l.config.c.lora_dropout = 0.5;
    l.config.ppo.per_device_train_batch_size = 3;
    l.config.ppo.num_ppo_epochs = l.config.ppo.num_mini_batches = 1;
    l.config.c.learning_rate = 1e-2;
    lab_start(&l);
    for (int i = 0; i < 3; i++) {
        lab_step(&l, 1);
        CHECK_NEAR(rlhf_trainer_metric(l.t, "val/ratio_first"), 1, 0);
        CHECK_NEAR(rlhf_trainer_metric(l.t, "policy/approxkl_avg"), 0, 0);
    }
    CHECK(fabs(rlhf_trainer_metric(l.t, "objective/kl_exact")) > 1e-5); /* it did move */
    lab_close(&l);
}

/* Layers that are computed again are the same bits. */
TEST(gradient_checkpointing) {
    for (int c = 0; c < CONFIGS; c++) {
        base_for_labs(configs[c]);
        for (int s = SFT; s <= PPO; s++)
            for (int peft = 0; peft < 2; peft++) {
                outcome o[2];
                for (int again = 0; again < 2; again++) {
                    lab l = lab_new((stage)s, "base", 1 + again);
                    l.config.c.use_peft = peft;
                    l.config.c.gradient_checkpointing = again;
                    o[again] = outcome_of(&l, 2);
                }
                CHECK(o[0].hash == o[1].hash && o[0].value == o[1].value);
                CHECK_NEAR(o[0].loss[1], o[1].loss[1], 0);
            }
        test_remove(test_path("base"));
    }
}

/* ---- stopping and going on ------------------------------------------------------------------- */

static int stop_at(void *user, const rlhf_progress *p) {
    const int *step = user;
    return strcmp(p->what, "generate") != 0 && p->done == *step;
}

/* A run of six steps in the folder dir that the hook stops after `stop` of them (0: never), all of
 * it new as in a new process. */
static void travel(stage s, int peft, const char *dir, int stop, int resume) {
    char path[1024];
    lab l = lab_hooked(s, "base", 1, stop_at, &stop);
    snprintf(path, sizeof path, "%s", test_path(dir));
    l.config.c.output_dir = path;
    l.config.c.use_peft = peft;
    l.config.c.max_steps = 6;
    l.config.c.save_steps = 2;
    l.config.c.resume = resume;
    l.config.c.warmup_steps = 2;
    lab_start(&l);
    CHECK_EQ_I(rlhf_trainer_run(l.t), stop ? RLHF_STOPPED : RLHF_OK);
    CHECK_EQ_I(rlhf_trainer_steps_done(l.t), stop ? stop : 6);
    lab_close(&l);
}

/* A run in one go in the folder a, the same run in two parts in b. */
static void there_and_back(stage s, int peft) {
    travel(s, peft, "a", 0, 0);
    travel(s, peft, "b", 3, 0);
    CHECK(access(test_path("b/checkpoint/trainer_state.json"), F_OK) == 0);
    CHECK(access(test_path("b/adapter_config.json"), F_OK) != 0);
    travel(s, peft, "b", 0, 1);
    same_file("a", "b", peft ? "adapter_model.safetensors" : "model.safetensors");
    same_file("a", "b", peft ? "adapter_config.json" : "config.json");
    same_file("a", "b", "metrics.jsonl");
    if (s == RM && peft) same_file("a", "b", "reward.json");
    CHECK((access(test_path("a/model.safetensors"), F_OK) != 0) == peft);
    /* The result opens as what it is. */
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_model *m = open_in(ctx, "a");
    CHECK_EQ_I(m->c.head, s == RM ? RLHF_HEAD_SCORE : RLHF_HEAD_LM);
    CHECK_EQ_I(m->c.lora.r, peft ? 3 : 0);
    CHECK(s != RM || m->score_trained);
    rlhf_model_close(m);
    rlhf_close(ctx);
    test_remove(test_path("a"));
    test_remove(test_path("b"));
}

TEST(stop_and_resume) {
    for (int c = 1; c < 4; c += 2) {
        base_for_labs(configs[c]);
        for (int s = SFT; s <= PPO; s++)
            for (int peft = 0; peft < 2; peft++) there_and_back((stage)s, peft);
        test_remove(test_path("base"));
    }
}

/* ---- models on one base ---------------------------------------------------------------------- */

static int only_adapters(const rlhf_model *m) {
    for (int p = 0; p < P_COUNT; p++) {
        int init = model_param_info[p].init, own = init == 'a' || init == 'b' || p == P_SCORE;
        for (int l = 0; l < model_param_layers(m, p); l++)
            if ((model_g(m, p, l) != NULL) != own) return 0;
    }
    return 1;
}

TEST(ppo_on_one_base) {
    for (int c = 0; c < CONFIGS; c++) {
        rlhf_ctx *ctx = test_context("auto", 1);
        rlhf_model *rm = adapter_make(ctx, configs[c], RLHF_HEAD_SCORE,
                                      (model_lora){.r = 2, .alpha = 2});
        rlhf_model_close(rm);
        rlhf_close(ctx);
        lab l = lab_new(PPO, "base", 1);
        lab_models(&l);
        l.reward = open_in(l.ctx, "adapter");
        OK(l.ctx, lab_open(&l));
        rlhf_trainer *t = l.t;
        REQUIRE(t);
        CHECK(l.m->base && t->start->base == l.m->base && t->value->base == l.m->base);
        CHECK(l.reward->base == l.m->base);
        CHECK_EQ_I(l.m->base->refs, 4);
        CHECK_EQ_I(bases(l.ctx), 1);
        CHECK_EQ_I(t->opt->models, 2);
        CHECK_EQ_I(t->start->n, 0);
        CHECK_EQ_I(model_own_layers(t->value, P_SCORE), 1);
        CHECK_EQ_I(model_own_layers(l.m, P_SCORE), 0);
        CHECK(model_count(l.m, 1) < model_count(l.m, 0) / 2);
        uint64_t start = model_hash(t->start), reward = model_hash(l.reward);
        uint64_t policy = model_hash(l.m), value = model_hash(t->value);
        CHECK_EQ_I(value, reward);
        lab_step(&l, 2);
        CHECK(only_adapters(l.m) && only_adapters(t->value));
        CHECK(!l.reward->g && !t->start->g);
        CHECK(model_hash(t->start) == start && model_hash(l.reward) == reward);
        CHECK(model_hash(l.m) != policy && model_hash(t->value) != value);
        lab_close(&l);
        test_remove(test_path("adapter"));
        test_remove(test_path("base"));
    }
}

/* A value head on the policy's trunk: three models on the base, and adapters that both losses
 * train. */
TEST(ppo_on_one_trunk) {
    base_for_labs(configs[1]);
    uint64_t policy[2];
    for (int trained = 0; trained < 2; trained++) {
        lab l = lab_new(PPO, "base", 1);
        l.config.ppo.shared_trunk = 1;
        l.config.ppo.vf_coef = trained;
        lab_models(&l);
        OK(l.ctx, lab_open(&l));
        rlhf_trainer *t = l.t;
        REQUIRE(t);
        CHECK(l.m->base && t->start->base == l.m->base && !t->value->base);
        CHECK_EQ_I(l.m->base->refs, 2);
        CHECK_EQ_I(model_count(t->value, 0), t->value->c.d);
        lab_step(&l, 2);
        CHECK(only_adapters(l.m));
        policy[trained] = model_hash(l.m);
        lab_close(&l);
    }
    CHECK(policy[0] != policy[1]);
    test_remove(test_path("base"));
}

/* A model that was opened trains as one that never was in a file. */
TEST(trains_as_its_own) {
    for (int c = 0; c < CONFIGS; c++) {
        base_for_labs(configs[c]);
        for (int s = SFT; s <= PPO; s++) {
            uint64_t hash[2];
            for (int own = 0; own < 2; own++) {
                lab l = lab_new((stage)s, "base", 1);
                l.config.c.use_peft = 0;
                lab_models(&l);
                if (own) {
                    models_close(&l);
                    l.m = l.lm = model_make(l.ctx, configs[c], 'b');
                    if (s == RM) l.m = copy_of(l.lm, RLHF_HEAD_SCORE);
                }
                CHECK((l.m->base == NULL) == own);
                OK(l.ctx, lab_open(&l));
                CHECK(!l.m->base);
                lab_step(&l, 2);
                hash[own] = model_hash(l.m);
                lab_close(&l);
            }
            CHECK(hash[0] == hash[1]);
        }
        test_remove(test_path("base"));
    }
}

/* Before the first step adapters have no effect. */
TEST(adapters_begin_without_effect) {
    base_for_labs(gpt2);
    for (int s = SFT; s <= RM; s++) {
        double loss[2];
        for (int peft = 0; peft < 2; peft++) {
            lab l = lab_new((stage)s, "base", 1);
            l.config.c.use_peft = peft;
            l.config.c.lora_dropout = 0;
            loss[peft] = outcome_of(&l, 1).loss[0];
        }
        CHECK_NEAR(loss[0], loss[1], 0);
    }
}

TEST(use_peft_needs_a_base) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_model_close(model_make(ctx, llama, '4'));
    rlhf_close(ctx);
    for (int s = SFT; s <= PPO; s++) {
        lab l = lab_new((stage)s, "base", 1);
        inside data = {.kind = s, .n = 24};
        l.m = l.lm = model_make(l.ctx, llama, '4');
        if (s == RM) l.m = copy_of(l.lm, RLHF_HEAD_SCORE);
        OK(l.ctx, test_call(l.ctx, data_new, &data));
        l.train = data.d;
        uint64_t before = model_hash(l.m);
        int64_t live = test_live();
        CHECK_EQ_I(lab_open(&l), RLHF_ERR_ARG);
        CHECK(!l.t && strstr(rlhf_error(l.ctx), "use_peft") &&
              strstr(rlhf_error(l.ctx), "save this model and open it again"));
        CHECK(model_hash(l.m) == before && test_live() == live);
        /* A target that the family does not have. */
        lab_close(&l);
    }
    base_for_labs(llama);
    lab l = lab_new(SFT, "base", 1);
    l.config.c.lora_target_modules = "q_proj,c_attn";
    lab_models(&l);
    CHECK_EQ_I(lab_open(&l), RLHF_ERR_ARG);
    CHECK(strstr(rlhf_error(l.ctx), "lora_target_modules") && strstr(rlhf_error(l.ctx), "c_attn"));
    CHECK(l.m->base && !l.m->c.lora.r);
    lab_close(&l);
}

/* A model that has an adapter goes on training it, asked or not. */
TEST(an_adapter_goes_on) {
    for (int s = SFT; s <= PPO; s++)
        for (int peft = 0; peft < 2; peft++) {
            rlhf_ctx *ctx = test_context("auto", 1);
            rlhf_model_close(adapter_make(ctx, gemma2, s == RM ? RLHF_HEAD_SCORE : RLHF_HEAD_LM,
                                          (model_lora){.r = 2, .alpha = 5, .dropout = 0.5f}));
            rlhf_close(ctx);
            lab l = lab_new((stage)s, "base", 1);
            lab_models(&l);
            rlhf_model *m = open_in(l.ctx, "adapter"), *had = open_in(l.ctx, "adapter");
            if (l.m != l.lm) rlhf_model_close(l.m);
            l.m = m;
            l.config.c.use_peft = peft;
            OK(l.ctx, lab_open(&l));
            CHECK_EQ_I(m->c.lora.r, 2);
            CHECK_NEAR(m->c.lora.alpha, 5, 0);
            CHECK_NEAR(m->c.lora.dropout, peft ? 0.25 : 0.5, 0);
            CHECK_BITS(m->w, had->w, m->n);
            if (s == PPO) { /* the reference has the adapter that the policy begins with */
                CHECK_BITS(l.t->start->w, had->w, had->n);
                CHECK(l.t->start->base == m->base);
            }
            uint64_t frozen = model_hash(l.lm);
            lab_step(&l, 1);
            CHECK(memcmp(m->w, had->w, m->n * sizeof *m->w) != 0);
            CHECK_EQ_I(model_hash(l.lm), frozen);
            OK(l.ctx, rlhf_model_save(m, NULL, test_path("more")));
            CHECK(access(test_path("more/adapter_config.json"), F_OK) == 0);
            rlhf_model_close(had);
            rlhf_trainer_close(l.t);
            l.t = NULL;
            if (l.lm != m) rlhf_model_close(l.lm);
            l.lm = m;
            lab_close(&l);
            static const char *const dirs[] = {"adapter", "base", "more"};
            for (int i = 0; i < 3; i++) test_remove(test_path(dirs[i]));
        }
}

/* ---- memory runs out at every allocation ----------------------------------------------------- */

static void check_oom(rlhf_ctx *ctx, rlhf_status status, const char *what) {
    if (status == RLHF_OK) return;
    if (status != RLHF_ERR_MEMORY || !atomic_load(&test_call_failed))
        test_fail(__FILE__, __LINE__, "%s: %s (%s)", what, rlhf_status_text(status),
                  rlhf_error(ctx));
}

TEST(oom_adapter_open) {
    for (int head = 0; head < 2; head++) {
        rlhf_ctx *ctx = test_context("auto", 1);
        rlhf_model *m = adapter_make(ctx, neox, (rlhf_head)head, (model_lora){.r = 2, .alpha = 2});
        uint64_t want = model_hash(m);
        /* With the base open already, and then without. */
        for (int shared = 1; shared >= 0; shared--) {
            int64_t live = test_live(), n = 0;
            while (test_next_oom(&n)) {
                rlhf_model *o = NULL;
                rlhf_status status = rlhf_model_open(ctx, test_path("adapter"), &o);
                check_oom(ctx, status, "open");
                CHECK(!o == (status != RLHF_OK));
                if (o) CHECK(model_hash(o) == want);
                rlhf_model_close(o);
                CHECK_EQ_I(test_live(), live);
                CHECK_EQ_I(ctx->n_defer, 0);
                CHECK_EQ_I(bases(ctx), shared);
                if (shared) CHECK_EQ_I(m->base->refs, 1);
            }
            CHECK(n > 20);
            if (shared) rlhf_model_close(m);
        }
        rlhf_close(ctx);
        test_remove(test_path("adapter"));
        test_remove(test_path("base"));
    }
}

/* The first products on mapped weights: panels that were not finished are never used. */
TEST(oom_logits) {
    rlhf_ctx *ctx = test_context("auto", 1);
    base_make(ctx, tall, 'b', "base");
    rlhf_model *right = open_in(ctx, "base");
    size_t size = 3 * (size_t)right->c.vocab;
    float *want = logits_of(right, 3), *got = calloc(size, sizeof *got);
    const int32_t ids[3] = {token(0), token(1), token(2)};
    int64_t n = 0;
    rlhf_model_close(right);
    while (test_next_oom(&n)) {
        int64_t call = n;
        test_fail_at(0);
        rlhf_model *m = open_in(ctx, "base");
        test_fail_at(call);
        rlhf_status status = rlhf_model_logits(m, ids, 3, got);
        bool failed = atomic_load(&test_call_failed);
        check_oom(ctx, status, "logits");
        test_fail_at(0);
        if (status) OK(ctx, rlhf_model_logits(m, ids, 3, got));
        CHECK_BITS(got, want, size);
        rlhf_model_close(m);
        atomic_store(&test_call_failed, failed);
    }
    CHECK(n > 3);
    free(want);
    free(got);
    rlhf_close(ctx);
}

/* Opening a trainer: the models are as they were, or have an adapter that changes nothing. */
static void oom_trainer(stage s, const char *from, int reward) {
    lab l = lab_new(s, from, 1);
    lab_models(&l);
    if (reward) l.reward = open_in(l.ctx, "adapter");
    float *want = logits_of(l.lm, 6);
    int64_t n = 0;
    while (test_next_oom(&n)) {
        int64_t call = n;
        test_fail_at(0);
        models_close(&l);
        models_open(&l);
        int64_t live = test_live();
        test_fail_at(call);
        rlhf_status status = lab_open(&l);
        bool failed = atomic_load(&test_call_failed);
        check_oom(l.ctx, status, "trainer");
        CHECK(!l.t == (status != RLHF_OK));
        test_fail_at(0);
        rlhf_trainer_close(l.t);
        l.t = NULL;
        CHECK_EQ_I(test_live(), live);
        CHECK_EQ_I(l.ctx->n_defer, 0);
        CHECK(!l.m->g);
        float *now = logits_of(l.lm, 6);
        CHECK_BITS(now, want, 6 * VOCAB);
        free(now);
        atomic_store(&test_call_failed, failed);
    }
    CHECK(n > 4);
    free(want);
    OK(l.ctx, lab_open(&l));
    lab_step(&l, 1);
    lab_close(&l);
}

TEST(oom_trainers) {
    base_for_labs(llama);
    for (int s = SFT; s <= PPO; s++) oom_trainer((stage)s, "base", 0);
    test_remove(test_path("base"));
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_model_close(
        adapter_make(ctx, gpt2, RLHF_HEAD_LM, (model_lora){.r = 2, .alpha = 2}));
    rlhf_close(ctx);
    oom_trainer(PPO, "adapter", 0);
    test_remove(test_path("adapter"));
    ctx = test_context("auto", 1);
    rlhf_model_close(
        adapter_make(ctx, gpt2, RLHF_HEAD_SCORE, (model_lora){.r = 2, .alpha = 2}));
    rlhf_close(ctx);
    oom_trainer(PPO, "base", 1);
}

TEST_MAIN(CASE(adapter_and_merged), CASE(names_of_targets), CASE(mapped_as_thawed),
          CASE(matrices_in_blocks), CASE(kernels_and_threads),
          CASE(one_base_for_a_directory), CASE(a_directory_that_changes),
          CASE(adapter_directory), CASE(files_as_peft_has_them), CASE(adapter_without_a_head),
          CASE(adapter_configs), CASE(adapter_tensors),
          CASE(heads_of_one_base), CASE(a_config_that_changes), CASE(share_of_zeros),
          CASE(gradients_under_dropout), CASE(dropout_and_batches),
          CASE(dropout_differs_between_steps), CASE(ppo_drops_nothing),
          CASE(gradient_checkpointing), CASE(stop_and_resume), CASE(ppo_on_one_base),
          CASE(ppo_on_one_trunk), CASE(trains_as_its_own), CASE(adapters_begin_without_effect),
          CASE(use_peft_needs_a_base),
          CASE(an_adapter_goes_on), CASE(oom_adapter_open), CASE(oom_logits), CASE(oom_trainers))
