/* Whole models of all families against a model in double precision that is written
 * here from the papers, and against themselves: any kernels, any threads, alone or in a batch, in
 * one batch or in several, at once or token by token. */

#include "../rlhf.c"
#include "test.h"

/* ---- models ---------------------------------------------------------------------------------- */

static const char gpt2_tied[] =
    "{'model_type':'gpt2','vocab_size':37,'n_embd':24,'n_layer':2,'n_head':3,'n_positions':70,"
    "'n_inner':40,'layer_norm_epsilon':1e-4}";
static const char gpt2_untied[] =
    "{'model_type':'gpt2','vocab_size':50,'n_embd':20,'n_layer':3,'n_head':1,'n_positions':70,"
    "'tie_word_embeddings':false}";
static const char gpt2_score[] =
    "{'model_type':'gpt2','architectures':['GPT2ForSequenceClassification'],'vocab_size':37,"
    "'n_embd':24,'n_layer':2,'n_head':2,'n_positions':70}";
static const char llama_grouped[] = /* heads wider than the model, biases everywhere */
    "{'model_type':'llama','vocab_size':41,'hidden_size':24,'num_hidden_layers':2,"
    "'num_attention_heads':4,'num_key_value_heads':2,'head_dim':8,'intermediate_size':36,"
    "'max_position_embeddings':70,'attention_bias':true,'mlp_bias':true,'rope_theta':500.0}";
static const char llama_tied[] =
    "{'model_type':'llama','vocab_size':33,'hidden_size':32,'num_hidden_layers':3,"
    "'num_attention_heads':4,'num_key_value_heads':1,'intermediate_size':50,"
    "'max_position_embeddings':70,'tie_word_embeddings':true,'rms_norm_eps':1e-5}";
static const char llama_score[] =
    "{'model_type':'llama','architectures':['LlamaForSequenceClassification'],'vocab_size':41,"
    "'hidden_size':24,'num_hidden_layers':2,'num_attention_heads':2,'intermediate_size':36,"
    "'max_position_embeddings':70}";

static const char mistral_window[] = /* in every layer */
    "{'model_type':'mistral','vocab_size':37,'hidden_size':16,'num_hidden_layers':2,"
    "'num_attention_heads':2,'num_key_value_heads':1,'intermediate_size':20,"
    "'max_position_embeddings':70,'sliding_window':9}";
static const char qwen3_window[] = /* in the second layer */
    "{'model_type':'qwen3','vocab_size':37,'hidden_size':20,'num_hidden_layers':2,"
    "'num_attention_heads':4,'num_key_value_heads':2,'head_dim':8,'intermediate_size':30,"
    "'max_position_embeddings':70,'rope_parameters':{'rope_theta':300.0,'rope_type':'default'},"
    "'use_sliding_window':true,'sliding_window':20,'max_window_layers':1}";
static const char smollm3_linear[] = /* no positions in the second layer */
    "{'model_type':'smollm3','vocab_size':37,'hidden_size':24,'num_hidden_layers':3,"
    "'num_attention_heads':3,'num_key_value_heads':1,'intermediate_size':30,"
    "'max_position_embeddings':70,'no_rope_layer_interval':2,"
    "'rope_scaling':{'type':'linear','factor':2.5}}";
static const char neox_parallel[] =
    "{'model_type':'gpt_neox','vocab_size':37,'hidden_size':24,'num_hidden_layers':2,"
    "'num_attention_heads':3,'intermediate_size':40,'max_position_embeddings':70,"
    "'rotary_pct':0.5,'rotary_emb_base':200}";
static const char neox_serial[] =
    "{'model_type':'gpt_neox','vocab_size':37,'hidden_size':16,'num_hidden_layers':2,"
    "'num_attention_heads':2,'intermediate_size':20,'max_position_embeddings':70,"
    "'rope_parameters':{'rope_theta':200,'partial_rotary_factor':1.0,'rope_type':'default'},"
    "'use_parallel_residual':false,'tie_word_embeddings':true,'hidden_act':'gelu_new'}";
static const char gemma_biases[] =
    "{'model_type':'gemma','vocab_size':37,'hidden_size':20,'num_hidden_layers':2,"
    "'num_attention_heads':2,'num_key_value_heads':1,'head_dim':12,'intermediate_size':30,"
    "'max_position_embeddings':70,'hidden_act':'gelu','attention_bias':true}";
static const char gemma2_caps[] =
    "{'model_type':'gemma2','vocab_size':37,'hidden_size':20,'num_hidden_layers':3,"
    "'num_attention_heads':4,'num_key_value_heads':2,'head_dim':8,'intermediate_size':30,"
    "'max_position_embeddings':70,'query_pre_attn_scalar':5,'sliding_window':12,"
    "'attn_logit_softcapping':1.5,'final_logit_softcapping':2.0}";
static const char gemma3_local[] =
    "{'model_type':'gemma3_text','vocab_size':37,'hidden_size':20,'num_hidden_layers':3,"
    "'num_attention_heads':2,'num_key_value_heads':1,'head_dim':8,'intermediate_size':30,"
    "'max_position_embeddings':70,'query_pre_attn_scalar':6,'sliding_window':10,"
    "'sliding_window_pattern':3,'rope_theta':1000.0,'rope_local_base_freq':50.0,"
    "'rope_scaling':{'rope_type':'linear','factor':8.0}}";
static const char gemma2_score[] =
    "{'model_type':'gemma2','architectures':['Gemma2ForSequenceClassification'],'vocab_size':37,"
    "'hidden_size':20,'num_hidden_layers':2,'num_attention_heads':2,'num_key_value_heads':1,"
    "'head_dim':8,'intermediate_size':30,'max_position_embeddings':70,'sliding_window':12,"
    "'attn_logit_softcapping':2.5}";

static const char *const language_models[] = {
    gpt2_tied,      gpt2_untied,   llama_grouped, llama_tied,   mistral_window, qwen3_window,
    smollm3_linear, neox_parallel, neox_serial,   gemma_biases, gemma2_caps,    gemma3_local};
static const char *const scorers[] = {gpt2_score, llama_score, gemma2_score};
enum {
    LANGUAGE_MODELS = sizeof language_models / sizeof *language_models,
    SCORERS = sizeof scorers / sizeof *scorers
};

static const char *const param_names[P_COUNT] = {
#define PARAM_NAME(name, per_layer, rows, cols, exists, init) #name,
    MODEL_PARAMS(PARAM_NAME)
#undef PARAM_NAME
};

/* A config.json, with ' for ". */
static json_t *parse(const char *text) {
    char *copy = strdup(text);
    for (char *c = copy; *c; c++)
        if (*c == '\'') *c = '"';
    json_t *config = json_loads(copy, 0, NULL);
    free(copy);
    return config;
}

typedef struct build {
    const char *config;
    rlhf_model *m;
} build;

static void build_run(rlhf_ctx *ctx, void *arg) {
    build *b = arg;
    json_src src = json_source(ctx, "config.json");
    json_t *config = json_hold(ctx, parse(b->config));
    b->m = model_new(ctx, &src, config);
    model_place(b->m, NULL);
    b->m->config = config;
    err_keep(ctx);
    model_randomize(b->m, 7);
}

/* A model whose every weight, norms and biases too, is random, with gradients; always the same. */
static rlhf_model *model_make(rlhf_ctx *ctx, const char *config) {
    build b = {config, NULL};
    CHECK_EQ_I(test_call(ctx, build_run, &b), RLHF_OK);
    rlhf_model *m = b.m;
    for (int p = 0; p < P_COUNT; p++)
        for (int l = 0; l < model_param_layers(m, p); l++)
            for (size_t i = 0; i < m->slot[p].n; i++) {
                size_t at = model_at(m, p, l) + i;
                double u = 2 * rng_uniform(1, 1000, at) - 1;
                m->w[at] = (float)(m->slot[p].cols > 1 ? 0.4 * u : m->w[at] + 0.3 * u);
            }
    m->version++;
    m->g = mem_zalloc(ctx, m->n, sizeof *m->g);
    return m;
}

static void model_drop(rlhf_model *m) {
    mem_free(m->g);
    model_free(m);
}

/* ---- batches --------------------------------------------------------------------------------- */

enum { MAX_SEQS = 6, MAX_LEN = 70, MAX_ROWS = MAX_SEQS * MAX_LEN };

typedef struct batch {
    int seqs, rows, tokens; /* tokens: rows that have a next one */
    int len[MAX_SEQS];
    int32_t id[MAX_SEQS][MAX_LEN];
    const int32_t *ids[MAX_SEQS];
} batch;

static void batch_fill(batch *b, const rlhf_model *m, const int *len, int seqs) {
    *b = (batch){.seqs = seqs};
    for (int s = 0; s < seqs; s++) {
        b->len[s] = len[s];
        b->ids[s] = b->id[s];
        b->rows += len[s];
        b->tokens += len[s] - 1;
        for (int t = 0; t < len[s]; t++) {
            uint64_t draw = rng_u64(3, 77, (uint64_t)(s * 100 + t));
            b->id[s][t] = (int32_t)(draw % (uint64_t)m->c.vocab);
        }
    }
}

/* Sequences [from, to) of a batch. */
static batch batch_part(const batch *b, int from, int to) {
    batch p = {.seqs = to - from};
    for (int s = 0; s < p.seqs; s++) {
        p.len[s] = b->len[from + s];
        p.ids[s] = b->ids[from + s];
        p.rows += p.len[s];
        p.tokens += p.len[s] - 1;
    }
    return p;
}

/* One pass: next-token log-probabilities, or the scores of the last rows. */
typedef struct pass {
    rlhf_model *m;
    const batch *b;
    int save, back;
    double coef; /* d loss / d logp of every token; the loss of a scorer is sum_s weight(s) score */
    float *x;    /* out: residual stream [rows][d] */
    float *out;  /* out: log-probabilities [tokens], or scores [seqs] */
    const int *shared; /* as in model_batch */
} pass;

static float score_weight(int s) { return s % 2 ? -0.7f : 1.0f + 0.1f * (float)s; }

static void pass_coef(void *user, int row, int n, const op_rows *found, float *coef) {
    const pass *p = user;
    (void)row, (void)found;
    for (int i = 0; i < n; i++) coef[i] = (float)p->coef;
}

static void pass_lm(pass *p, arena *ws, model_run *run) {
    op_env e = {p->m->ctx, ws};
    int row[MAX_ROWS], n = 0;
    int32_t target[MAX_ROWS];
    for (int s = 0; s < p->b->seqs; s++)
        for (int t = 0; t + 1 < p->b->len[s]; t++) {
            row[n] = run->seq[s].row + t;
            target[n++] = p->b->ids[s][t + 1];
        }
    model_top top = model_top_fwd(p->m, ws, run->x, row, n);
    op_weight w = model_head_weight(p->m, n);
    op_rows found = {.logp = p->out};
    float *dh = arena_floats(ws, (size_t)n, (size_t)p->m->c.d);
    op_vocab_run(&e, &w, n, top.h, target, 1, &found, p->back ? pass_coef : NULL, p, dh);
    if (p->back) model_backward(p->m, ws, run, model_top_bwd(p->m, ws, &top, dh, run->rows));
}

static void pass_score(pass *p, arena *ws, model_run *run) {
    int row[MAX_SEQS];
    float d[MAX_SEQS];
    for (int s = 0; s < p->b->seqs; s++) {
        row[s] = run->seq[s].row + run->seq[s].n - 1;
        d[s] = score_weight(s);
    }
    model_top top = model_top_fwd(p->m, ws, run->x, row, p->b->seqs);
    model_scores(p->m, ws, &top, p->out);
    if (!p->back) return;
    float *dh = arena_floats(ws, (size_t)top.n, (size_t)p->m->c.d);
    model_scores_bwd(p->m, ws, &top, d, dh);
    model_backward(p->m, ws, run, model_top_bwd(p->m, ws, &top, dh, run->rows));
}

static void pass_run(rlhf_ctx *ctx, void *arg) {
    pass *p = arg;
    (void)ctx;
    arena *ws = &p->m->ws;
    arena_reset(ws);
    model_run run = model_batch(ws, p->b->seqs, p->b->ids, p->b->len, p->shared);
    run.save = p->save;
    run.recompute = p->m->recompute;
    model_forward(p->m, ws, &run);
    memcpy(p->x, run.x, (size_t)run.rows * (size_t)p->m->c.d * sizeof *p->x);
    if (p->m->c.head == RLHF_HEAD_SCORE) pass_score(p, ws, &run);
    else pass_lm(p, ws, &run);
}

/* Results that pass_run writes, and the gradients. */
typedef struct result {
    float *x, *out;
    size_t nx, n_out;
} result;

static result result_new(const rlhf_model *m, const batch *b) {
    result r = {.nx = (size_t)(b->rows * m->c.d),
                .n_out = (size_t)(m->c.head == RLHF_HEAD_SCORE ? b->seqs : b->tokens)};
    r.x = test_floats(r.nx);
    r.out = test_floats(r.n_out);
    return r;
}

static void result_free(result *r) {
    CHECK(test_margins(r->x, r->nx) && test_margins(r->out, r->n_out));
    test_floats_free(r->x);
    test_floats_free(r->out);
}

/* Forward and, if back, gradients on top of those that are there. */
static void go(rlhf_model *m, const batch *b, double coef, int back, result *r) {
    pass p = {m, b, back, back, coef, r->x, r->out, NULL};
    CHECK_EQ_I(test_call(m->ctx, pass_run, &p), RLHF_OK);
}

/* ---- the model in double precision ----------------------------------------------------------- */

typedef struct exact {
    const rlhf_model *m; /* its shape */
    const batch *b;
    double *w;           /* its weights */
} exact;

static const double *exact_w(const exact *e, int p, int layer) {
    return e->m->slot[p].n ? e->w + model_at(e->m, p, layer) : NULL;
}

static void exact_norm_of(const exact *e, int p, int layer, int d, const double *x, double *y) {
    const double *w = exact_w(e, p, layer);
    const double *b = e->m->c.layer_norm ? exact_w(e, p + 1, layer) : NULL;
    double mean = 0, var = 0, base = (double)e->m->c.norm_base;
    for (int i = 0; b && i < d; i++) mean += x[i] / d;
    for (int i = 0; i < d; i++) var += (x[i] - mean) * (x[i] - mean) / d;
    for (int i = 0; i < d; i++)
        y[i] = (x[i] - mean) / sqrt(var + (double)e->m->c.eps) * (base + w[i]) + (b ? b[i] : 0);
}

static void exact_norm(const exact *e, int p, int layer, const double *x, double *y) {
    exact_norm_of(e, p, layer, e->m->c.d, x, y);
}

/* y = W x + b, bias P_COUNT: none */
static void exact_linear(const exact *e, int p, int bias, int layer, const double *x, double *y) {
    const double *w = exact_w(e, p, layer), *b = bias < P_COUNT ? exact_w(e, bias, layer) : NULL;
    int rows = e->m->slot[p].rows, cols = e->m->slot[p].cols;
    for (int r = 0; r < rows; r++) {
        y[r] = b ? b[r] : 0;
        for (int c = 0; c < cols; c++) y[r] += w[r * cols + c] * x[c];
    }
}

static int exact_local(const exact *e, int layer) {
    return e->m->c.kinds && (e->m->c.kinds[layer] & MODEL_LOCAL);
}

static void exact_rope(const exact *e, int layer, double *x, int position) {
    const model_cfg *c = &e->m->c;
    int half = c->rot / 2, own = exact_local(e, layer) && c->local_theta > 0;
    double theta = (double)(own ? c->local_theta : c->theta);
    double factor = own || c->rope_factor <= 0 ? 1 : (double)c->rope_factor; /* linear */
    if (c->learned_pos || (c->kinds && (c->kinds[layer] & MODEL_NOPE))) return;
    for (int i = 0; i < half; i++) {
        double angle = position / pow(theta, (double)i / half) / factor;
        double a = x[i], b = x[half + i];
        x[i] = a * cos(angle) - b * sin(angle);
        x[half + i] = b * cos(angle) + a * sin(angle);
    }
}

/* The last of n rows of queries, keys and values. */
static void exact_attention(const exact *e, int layer, const double *qkv, int n, double *o) {
    const model_cfg *c = &e->m->c;
    int from = exact_local(e, layer) ? base_max(0, n - c->window) : 0;
    double cap = (double)c->attn_cap;
    int wide = (c->heads + 2 * c->kv_heads) * c->hd;
    for (int h = 0; h < c->heads; h++) {
        const double *q = qkv + (n - 1) * wide + h * c->hd;
        const double *k = qkv + (c->heads + h / (c->heads / c->kv_heads)) * c->hd;
        const double *v = k + c->kv_heads * c->hd;
        double sum = 0, p[MAX_LEN];
        for (int t = from; t < n; t++) {
            double dot = 0;
            for (int j = 0; j < c->hd; j++) dot += q[j] * k[t * wide + j];
            dot *= (double)c->attn_scale;
            sum += p[t] = exp(cap > 0 ? cap * tanh(dot / cap) : dot);
        }
        for (int j = 0; j < c->hd; j++) {
            double *y = o + h * c->hd + j;
            *y = 0;
            for (int t = from; t < n; t++) *y += p[t] / sum * v[t * wide + j];
        }
    }
}

static void exact_mlp(const exact *e, int layer, const double *h, double *y) {
    int ff = e->m->c.ff;
    double up[512], act[256];
    exact_linear(e, P_UP_W, P_UP_B, layer, h, up);
    for (int i = 0; i < ff; i++) {
        double u = up[i], v = sqrt(2 / 3.14159265358979324) * (u + 0.044715 * u * u * u);
        if (e->m->c.act == ACT_SILU) act[i] = u / (1 + exp(-u));
        else act[i] = u / 2 * (1 + (e->m->c.act == ACT_GELU_ERF ? erf(u / sqrt(2)) : tanh(v)));
        if (e->m->c.glu) act[i] *= up[ff + i];
    }
    exact_linear(e, P_DOWN_W, P_DOWN_B, layer, act, y);
}

/* Queries, keys and values of one row: normed, rotated. */
static void exact_qkv(const exact *e, int layer, const double *h, int t, double *qkv) {
    const model_cfg *c = &e->m->c;
    exact_linear(e, P_QKV_W, P_QKV_B, layer, h, qkv);
    for (int i = 0; i < c->heads + c->kv_heads; i++) {
        double *x = qkv + i * c->hd;
        int p = i < c->heads ? P_QN_W : P_KN_W;
        if (exact_w(e, p, layer)) exact_norm_of(e, p, layer, c->hd, x, x);
        exact_rope(e, layer, x, t);
    }
}

/* x += y, normed where the model has the norm p. */
static void exact_add(const exact *e, int p, int layer, double *x, double *y) {
    if (exact_w(e, p, layer)) exact_norm(e, p, layer, y, y);
    for (int i = 0; i < e->m->c.d; i++) x[i] += y[i];
}

/* The residual stream x [n][d] of one sequence. */
static void exact_forward(const exact *e, const int32_t *ids, int n, double *x) {
    const model_cfg *c = &e->m->c;
    int d = c->d, wide = (c->heads + 2 * c->kv_heads) * c->hd;
    double *qkv = malloc((size_t)(n * wide) * sizeof *qkv), h[128], o[128], y[128];
    double scale = c->embed_scale > 0 ? (double)c->embed_scale : 1;
    for (int t = 0; t < n; t++)
        for (int i = 0; i < d; i++)
            x[t * d + i] = scale * exact_w(e, P_WTE, 0)[ids[t] * d + i] +
                           (c->learned_pos ? exact_w(e, P_WPE, 0)[t * d + i] : 0);
    for (int l = 0; l < c->layers; l++)
        for (int t = 0; t < n; t++) {
            exact_norm(e, P_LN1_W, l, x + t * d, h);
            exact_qkv(e, l, h, t, qkv + t * wide);
            exact_attention(e, l, qkv, t + 1, o);
            exact_linear(e, P_O_W, P_O_B, l, o, y);
            if (c->parallel) exact_norm(e, P_LN2_W, l, x + t * d, h);
            exact_add(e, P_PN1_W, l, x + t * d, y);
            if (!c->parallel) exact_norm(e, P_LN2_W, l, x + t * d, h);
            exact_mlp(e, l, h, y);
            exact_add(e, P_PN2_W, l, x + t * d, y);
        }
    free(qkv);
}

/* Log-probability of the token after row t. */
static double exact_logp(const exact *e, const double *x, int32_t target) {
    double h[128], z[128], sum = 0, cap = (double)e->m->c.logit_cap;
    exact_norm(e, P_LNF_W, 0, x, h);
    exact_linear(e, e->m->c.tied ? P_WTE : P_HEAD, P_COUNT, 0, h, z);
    for (int v = 0; v < e->m->c.vocab && cap > 0; v++) z[v] = cap * tanh(z[v] / cap);
    for (int v = 0; v < e->m->c.vocab; v++) sum += exp(z[v]);
    return z[target] - log(sum);
}

/* The loss; out and xs, if not null, become what result holds. */
static double exact_loss(const exact *e, double *out, double *xs) {
    const batch *b = e->b;
    int d = e->m->c.d, k = 0;
    double loss = 0, *x = malloc((size_t)(MAX_LEN * d) * sizeof *x);
    for (int s = 0, row = 0; s < b->seqs; row += b->len[s++]) {
        exact_forward(e, b->ids[s], b->len[s], x);
        if (xs) memcpy(xs + row * d, x, (size_t)(b->len[s] * d) * sizeof *xs);
        if (e->m->c.head == RLHF_HEAD_SCORE) {
            double h[128], y;
            exact_norm(e, P_LNF_W, 0, x + (b->len[s] - 1) * d, h);
            exact_linear(e, P_SCORE, P_COUNT, 0, h, &y);
            loss += (double)score_weight(s) * y;
            if (out) out[s] = y;
            continue;
        }
        for (int t = 0; t + 1 < b->len[s]; t++, k++) {
            double y = exact_logp(e, x + t * d, b->ids[s][t + 1]);
            loss -= y / b->tokens;
            if (out) out[k] = y;
        }
    }
    free(x);
    return loss;
}

/* ---- values and gradients -------------------------------------------------------------------- */

static void check_values(const char *what, const float *got, const double *want, size_t n) {
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        double off = fabs((double)got[i] - want[i]) / (1 + fabs(want[i]));
        if (!(off <= worst)) worst = off;
    }
    if (!(worst <= 1e-5)) test_fail(__FILE__, __LINE__, "%s: off by %.3g", what, worst);
}

/* Entries of one parameter; relative to the largest slope that was met. */
static void check_param(exact *e, int p, int layer, const char *config) {
    size_t n = e->m->slot[p].n, at = model_at(e->m, p, layer);
    double worst = 0, top = 0;
    for (int i = 0; i < 6; i++) {
        size_t j = at + (size_t)test_int(0, (int64_t)n - 1);
        /* A token's row that no sequence holds has no gradient as input: take one that is held. */
        if (p == P_WTE) j = at + (size_t)(e->b->ids[0][i] * e->m->c.d + i);
        if (p == P_WPE) j = at + (size_t)(i * e->m->c.d + i);
        double keep = e->w[j], h = 1e-4;
        e->w[j] = keep + h;
        double up = exact_loss(e, NULL, NULL);
        e->w[j] = keep - h;
        double slope = (up - exact_loss(e, NULL, NULL)) / (2 * h);
        e->w[j] = keep;
        double off = fabs(slope - (double)e->m->g[j]);
        if (!(off <= worst)) worst = off;
        if (fabs(slope) > top) top = fabs(slope);
    }
    if (!(worst <= 5e-5 * top + 1e-6))
        test_fail(__FILE__, __LINE__, "%s of layer %d: gradient off by %.3g of %.3g, model %s",
                  param_names[p], layer, worst, top, config);
    else if (top == 0 && !test_quick())
        test_fail(__FILE__, __LINE__, "%s of layer %d: no slope, model %s", param_names[p], layer,
                  config);
}

static void check_model(const char *config) {
    static const int len[] = {9, 2, 17, 5};
    rlhf_ctx *ctx = test_context("auto", 2);
    rlhf_model *m = model_make(ctx, config);
    batch b;
    batch_fill(&b, m, len, 4);
    result r = result_new(m, &b);
    go(m, &b, -1.0 / b.tokens, 1, &r);
    exact e = {m, &b, malloc(m->n * sizeof *e.w)};
    for (size_t i = 0; i < m->n; i++) e.w[i] = (double)m->w[i];
    double *out = malloc(r.n_out * sizeof *out), *x = malloc(r.nx * sizeof *x);
    exact_loss(&e, out, x);
    check_values("residual stream", r.x, x, r.nx);
    check_values("output", r.out, out, r.n_out);
    for (int p = 0; p < P_COUNT; p++)
        for (int l = 0; l < model_param_layers(m, p); l++) check_param(&e, p, l, config);
    free(out), free(x), free(e.w);
    result_free(&r);
    model_drop(m);
    rlhf_close(ctx);
}

TEST(gradients_gpt2) {
    check_model(gpt2_tied);
    check_model(gpt2_untied);
}

TEST(gradients_llama) {
    check_model(llama_grouped);
    check_model(llama_tied);
}

TEST(gradients_families) {
    for (int i = 4; i < LANGUAGE_MODELS; i++) check_model(language_models[i]);
}

TEST(gradients_scorers) {
    for (int i = 0; i < SCORERS; i++) check_model(scorers[i]);
}

/* ---- the same bits --------------------------------------------------------------------------- */

static const int long_len[MAX_SEQS] = {30, 1, 65, 3, 50, 17};

static int long_seqs(void) { return test_quick() ? 4 : MAX_SEQS; }

/* Forward and gradients with every table and number of threads. */
static void check_everywhere(const char *config) {
    static const int threads[] = {1, 2, 3, 5};
    float *g = NULL;
    result first = {0};
    for (int t = K_TABLES - 1; t >= 0; t--)
        for (int i = 0; i < 4; i++) {
            if (!k_tables[t]->available() || (i && (t == K_TABLES - 1 || test_quick()))) continue;
            rlhf_ctx *ctx = test_context(k_tables[t]->name, threads[i]);
            rlhf_model *m = model_make(ctx, config);
            batch b;
            batch_fill(&b, m, long_len, long_seqs());
            result r = result_new(m, &b);
            go(m, &b, -1.0 / b.tokens, 1, &r);
            if (g) {
                CHECK_BITS(r.x, first.x, r.nx);
                CHECK_BITS(r.out, first.out, r.n_out);
                CHECK_BITS(m->g, g, m->n);
                result_free(&r);
            } else {
                first = r;
                g = malloc(m->n * sizeof *g);
                memcpy(g, m->g, m->n * sizeof *g);
            }
            model_drop(m);
            rlhf_close(ctx);
        }
    result_free(&first);
    free(g);
}

TEST(kernels_and_threads) {
    check_everywhere(gpt2_tied);
    check_everywhere(llama_grouped);
    check_everywhere(llama_score);
    check_everywhere(neox_parallel);
    check_everywhere(gemma2_caps);
    if (test_quick()) return;
    check_everywhere(qwen3_window);
    check_everywhere(gemma3_local);
    check_everywhere(gpt2_untied);
    check_everywhere(llama_tied);
}

/* Not only everywhere on this machine: a hash of the gradients, the same on every machine. */
TEST(the_same_on_every_machine) {
    static const struct { const char *config; uint64_t want; } cases[] = {
        {gpt2_tied, 0x4eea542ae122c4bf},
        {gpt2_untied, 0xb47a11332c3737ac},
        {llama_grouped, 0xafbdd23f4c06d94f},
        {llama_tied, 0x67dfb95441681f73},
        {gpt2_score, 0xee290492fc0fe4b9},
        {llama_score, 0xca243c70f28cd2c8},
        {qwen3_window, 0x912760f01ebb2e70},
        {neox_parallel, 0x5003a8463e5d516c},
        {gemma2_caps, 0x41d850ba7cfc698e},
        {gemma3_local, 0x8db922b71c65592c}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rlhf_ctx *ctx = test_context("auto", 2);
        rlhf_model *m = model_make(ctx, cases[i].config);
        batch b;
        batch_fill(&b, m, long_len, 3);
        result r = result_new(m, &b);
        go(m, &b, -1.0 / b.tokens, 1, &r);
        /* The gradients take the weights' place: that is what model_hash reads. */
        memcpy(m->w, m->g, m->n * sizeof *m->w);
        uint64_t hash = model_hash(m);
        if (hash != cases[i].want)
            test_fail(__FILE__, __LINE__, "hash %016" PRIx64 " of %s", hash, cases[i].config);
        result_free(&r);
        model_drop(m);
        rlhf_close(ctx);
    }
}

/* Without keeping anything for backward, and one sequence at a time. */
static void check_alone(const char *config) {
    rlhf_ctx *ctx = test_context("auto", 2);
    rlhf_model *m = model_make(ctx, config);
    batch b;
    batch_fill(&b, m, long_len, long_seqs());
    result r = result_new(m, &b), again = result_new(m, &b);
    go(m, &b, 1, 1, &r);
    go(m, &b, 1, 0, &again);
    CHECK_BITS(again.x, r.x, r.nx);
    CHECK_BITS(again.out, r.out, r.n_out);
    size_t row = 0, at = 0;
    for (int s = 0; s < b.seqs; s++) {
        batch one = batch_part(&b, s, s + 1);
        result q = result_new(m, &one);
        go(m, &one, 1, s % 2, &q);
        CHECK_BITS(q.x, r.x + row, q.nx);
        CHECK_BITS(q.out, r.out + at, q.n_out);
        row += q.nx;
        at += q.n_out;
        result_free(&q);
    }
    result_free(&r), result_free(&again);
    model_drop(m);
    rlhf_close(ctx);
}

TEST(alone_and_in_a_batch) {
    for (int i = 0; i < LANGUAGE_MODELS; i++) check_alone(language_models[i]);
    for (int i = 0; i < SCORERS; i++) check_alone(scorers[i]);
}

/* Gradients of micro-batches add up to the bits of the whole batch; a tied matrix gets its two
 * kinds of gradient in another order. */
static void check_parts(const char *config) {
    rlhf_ctx *ctx = test_context("auto", 2);
    rlhf_model *m = model_make(ctx, config);
    batch b;
    batch_fill(&b, m, long_len, long_seqs());
    result r = result_new(m, &b);
    go(m, &b, -1.0 / b.tokens, 1, &r);
    float *whole = m->g;
    for (int step = 1; step < b.seqs; step++) {
        m->g = mem_zalloc(ctx, m->n, sizeof *m->g);
        for (int s = 0; s < b.seqs; s += step) {
            batch part = batch_part(&b, s, base_min(s + step, b.seqs));
            go(m, &part, -1.0 / b.tokens, 1, &r);
        }
        for (int p = 0; p < P_COUNT; p++)
            for (int l = 0; l < model_param_layers(m, p); l++) {
                const float *x = m->g + model_at(m, p, l), *y = whole + model_at(m, p, l);
                if (p != P_WTE || !m->c.tied) CHECK_BITS(x, y, m->slot[p].n);
                else
                    for (size_t i = 0; i < m->slot[p].n; i++) CHECK_NEAR(x[i], y[i], 1e-6);
            }
        mem_free(m->g);
    }
    m->g = whole;
    result_free(&r);
    model_drop(m);
    rlhf_close(ctx);
}

TEST(micro_batches) {
    for (int i = 0; i < LANGUAGE_MODELS; i++) check_parts(language_models[i]);
}

/* ---- sequences that begin alike -------------------------------------------------------------- */

/* Scores of sequences that share their beginnings have the bits of whole ones; the gradients are
 * the same sums, added in another order. */
static void check_shared(const char *config, int recompute) {
    static const int len[MAX_SEQS] = {30, 24, 8, 50, 51, 2};
    int shared[MAX_SEQS] = {0, 23, 3, 0, 40, 1};
    rlhf_ctx *ctx = test_context("auto", 2);
    rlhf_model *m = model_make(ctx, config);
    m->recompute = recompute;
    batch b;
    batch_fill(&b, m, len, MAX_SEQS);
    for (int s = 0, lead = 0; s < MAX_SEQS; s++) {
        if (!shared[s]) lead = s;
        memcpy(b.id[s], b.id[lead], (size_t)shared[s] * sizeof *b.id[s]);
    }
    result whole = result_new(m, &b), part = result_new(m, &b);
    go(m, &b, 1, 1, &whole);
    float *g = m->g;
    m->g = mem_zalloc(ctx, m->n, sizeof *m->g);
    pass p = {m, &b, 1, 1, 1, part.x, part.out, shared};
    CHECK_EQ_I(test_call(ctx, pass_run, &p), RLHF_OK);
    CHECK_BITS(part.out, whole.out, MAX_SEQS);
    for (int k = 0; k < P_COUNT; k++)
        for (int l = 0; l < model_param_layers(m, k); l++) {
            double off = 0, norm = 0;
            for (size_t i = 0; i < m->slot[k].n; i++) {
                size_t at = model_at(m, k, l) + i;
                double x = (double)m->g[at], y = (double)g[at];
                off += (x - y) * (x - y), norm += y * y;
            }
            CHECK(off <= 1e-10 * norm);
        }
    mem_free(g);
    result_free(&whole), result_free(&part);
    model_drop(m);
    rlhf_close(ctx);
}

TEST(shared_beginnings) {
    for (int i = 0; i < SCORERS; i++) check_shared(scorers[i], i % 2);
}

static void score_list(rlhf_ctx *ctx, void *arg) {
    enum { N = 40, LEN = 30 };
    (void)ctx;
    rlhf_model *m = arg;
    int32_t id[N][LEN];
    const int32_t *ids[N];
    int len[N], shared[N];
    /* Pairs behind a beginning that all have, some of which have more in common. */
    for (int i = 0; i < N; i++) {
        len[i] = 9 + (i * 7) % (LEN - 9);
        ids[i] = id[i];
        for (int t = 0; t < LEN; t++) {
            int same = t < 3 ? 0 : t < 8 ? i / 2 : t < 20 && i / 2 % 3 == 1 ? 1 + i / 2 : 100 + i;
            id[i][t] = (int32_t)(rng_u64(3, 5, (uint64_t)(same * 100 + t)) % (uint64_t)m->c.vocab);
        }
    }
    model_share(N, ids, len, shared);
    /* What is shared takes memory, too: its keys and values. */
    CHECK(model_own(m, 30, 0) == 30 && model_own(m, 5000, 4990) > 20);
    CHECK(model_own(m, 5000, 4990) < 2500);
    float score[N], alone;
    model_score_list(m, &m->ws, N, ids, len, score);
    for (int i = 0; i < N; i++) {
        model_score_list(m, &m->ws, 1, ids + i, len + i, &alone);
        CHECK_BITS(&alone, score + i, 1);
    }
    /* A batch that begins in the middle. */
    for (int at = 1; at < N; at++) {
        int mine[N];
        memcpy(mine, shared, sizeof mine);
        int end = model_share_from(at, N, ids, len, mine);
        CHECK(end > at && !memcmp(mine + end, shared + end, (size_t)(N - end) * sizeof *mine));
        CHECK_EQ_I(mine[at], 0);
        for (int i = at, first = at; i < N; i++) {
            if (!mine[i]) first = i;
            CHECK(!memcmp(id[first], id[i], (size_t)mine[i] * sizeof *id[i]));
            CHECK(i == at || !mine[i] == !shared[i]);
        }
    }
}

TEST(who_leads) {
    static const int32_t a[] = {1, 2, 3, 4, 5}, b[] = {1, 2, 3, 4, 6, 7},
                         c[] = {1, 9, 9, 9, 9, 9, 9}, d[] = {1, 9, 9, 9, 9, 9, 8},
                         e[] = {1, 7}, f[] = {2, 7}, g[] = {2, 7};
    static const int32_t *const ids[] = {a, b, c, d, e, f, g};
    static const int len[] = {5, 6, 7, 7, 2, 2, 2}, want[] = {0, 4, 0, 6, 1, 0, 1};
    int shared[7];
    model_share(7, ids, len, shared);
    for (int i = 0; i < 7; i++) CHECK_EQ_I(shared[i], want[i]);
    /* A batch that begins with the second of three, which has less in common with the third. */
    static const int32_t x[] = {1, 2, 9, 9}, y[] = {1, 2, 3, 4, 8};
    static const int32_t *const three[] = {a, x, y};
    static const int long_as[] = {5, 4, 5};
    model_share(3, three, long_as, shared);
    CHECK(shared[0] == 0 && shared[1] == 2 && shared[2] == 4);
    CHECK_EQ_I(model_share_from(1, 3, three, long_as, shared), 3);
    CHECK(shared[1] == 0 && shared[2] == 2);
}

TEST(scores_of_a_list) {
    for (int i = 0; i < SCORERS; i++) {
        rlhf_ctx *ctx = test_context("auto", 2);
        rlhf_model *m = model_make(ctx, scorers[i]);
        CHECK_EQ_I(test_call(ctx, score_list, m), RLHF_OK);
        model_drop(m);
        rlhf_close(ctx);
    }
}

/* ---- decoding -------------------------------------------------------------------------------- */

typedef struct decode {
    rlhf_model *m;
    const batch *b;
    int prompt;       /* sequence s begins with s + prompt tokens at once */
    const result *at_once;
} decode;

/* The next n[s] tokens of every sequence that has any left; compares x and next-token logp. */
static void decode_step(decode *d, arena *ws, const op_kv *kv, int *done, const int *n) {
    rlhf_model *m = d->m;
    int live = 0, from[MAX_SEQS], row[MAX_ROWS], rows = 0, chosen = 0;
    int32_t ids[MAX_ROWS], pos[MAX_ROWS], target[MAX_ROWS];
    float logp[MAX_ROWS], want[MAX_ROWS];
    size_t w = (size_t)m->c.d;
    op_seq seq[MAX_SEQS];
    op_kv *part = arena_alloc(ws, (size_t)(m->c.layers * MAX_SEQS) * sizeof *part);
    for (int s = 0, first = 0; s < d->b->seqs; first += d->b->len[s++]) {
        int at = first - s; /* every sequence before has a row without a next token */
        if (!n[s]) continue;
        from[live] = first + done[s];
        seq[live++] = (op_seq){.row = rows, .n = n[s], .past = done[s]};
        for (int t = done[s]; t < done[s] + n[s]; t++, rows++) {
            ids[rows] = d->b->ids[s][t];
            pos[rows] = t;
            if (t + 1 == d->b->len[s]) continue;
            row[chosen] = rows;
            want[chosen] = d->at_once->out[at + t];
            target[chosen++] = d->b->ids[s][t + 1];
        }
    }
    for (int l = 0; l < m->c.layers; l++)
        for (int s = 0, k = 0; s < d->b->seqs; s++)
            if (n[s]) part[l * live + k++] = kv[l * d->b->seqs + s];
    model_run run = {.rows = rows, .seqs = live, .ids = ids, .pos = pos, .seq = seq, .kv = part};
    model_forward(m, ws, &run);
    for (int s = 0; s < live; s++)
        CHECK_BITS(run.x + (size_t)seq[s].row * w, d->at_once->x + (size_t)from[s] * w,
                   (size_t)seq[s].n * w);
    op_env e = {m->ctx, ws};
    model_top top = model_top_fwd(m, ws, run.x, row, chosen);
    op_weight head = model_head_weight(m, chosen);
    op_rows out = {.logp = logp};
    op_vocab_run(&e, &head, chosen, top.h, target, 1, &out, NULL, NULL, NULL);
    CHECK_BITS(logp, want, chosen);
}

static void decode_run(rlhf_ctx *ctx, void *arg) {
    decode *d = arg;
    arena keep = {.ctx = ctx};
    op_kv kv[8 * MAX_SEQS];
    int done[MAX_SEQS] = {0}, n[MAX_SEQS], left = 1;
    for (int i = 0; i < d->m->c.layers * d->b->seqs; i++)
        kv[i] = model_kv_new(d->m, &keep, d->b->len[i % d->b->seqs] + 5 * (i % 3));
    for (int round = 0; left; round++) {
        left = 0;
        for (int s = 0; s < d->b->seqs; s++) {
            int want = round == 0 ? d->prompt + s : 1;
            n[s] = base_min(want, d->b->len[s] - done[s]);
            left += n[s];
        }
        arena_reset(&d->m->ws);
        if (left) decode_step(d, &d->m->ws, kv, done, n);
        for (int s = 0; s < d->b->seqs; s++) done[s] += n[s];
    }
    arena_free(&keep);
}

/* The decoding model is a fresh one, so that its tables grow on the way. With bfloat16 its caches
 * are narrow. */
TEST(token_by_token) {
    for (int i = 0; i < 2 * LANGUAGE_MODELS; i++)
        for (int prompt = 1; prompt <= (test_quick() ? 1 : 31); prompt += 15) {
            rlhf_ctx *ctx = test_context("auto", 2);
            ctx->half = i % 2;
            rlhf_model *m = model_make(ctx, language_models[i / 2]);
            rlhf_model *fresh = model_make(ctx, language_models[i / 2]);
            batch b;
            batch_fill(&b, m, long_len, long_seqs());
            result r = result_new(m, &b);
            go(m, &b, 1, 1, &r);
            decode d = {fresh, &b, prompt, &r};
            CHECK_EQ_I(test_call(ctx, decode_run, &d), RLHF_OK);
            result_free(&r);
            model_drop(m);
            model_drop(fresh);
            rlhf_close(ctx);
        }
}

/* ---- state ----------------------------------------------------------------------------------- */

TEST(hash_of_weights) {
    for (int i = 0; i < LANGUAGE_MODELS; i++) {
        rlhf_ctx *ctx = test_context("auto", 1);
        rlhf_model *m = model_make(ctx, language_models[i]);
        rlhf_model *twin = model_make(ctx, language_models[i]);
        uint64_t hash = model_hash(m);
        CHECK(hash == model_hash(twin));
        for (int p = 0; p < P_COUNT; p++)
            for (int l = 0; l < model_param_layers(m, p); l++) {
                float *w = model_w(m, p, l) + test_int(0, (int64_t)m->slot[p].n - 1), keep = *w;
                *w = nextafterf(keep, 10);
                CHECK(model_hash(m) != hash);
                *w = keep;
            }
        CHECK(hash == model_hash(m));
        model_drop(m);
        model_drop(twin);
        rlhf_close(ctx);
    }
}

/* Pieces of a batch: as many tokens as may be, the last two alike, and never none. */
TEST(pieces_of_a_batch) {
    int even[10] = {80, 80, 80, 80, 80, 80, 80, 80, 80, 80}, odd[4] = {30, 500, 10, 10};
    CHECK_EQ_I(model_cut(even, 0, 4, 320), 4);
    CHECK_EQ_I(model_cut(even, 0, 4, 319), 2);
    CHECK_EQ_I(model_cut(even, 0, 4, 256), 2);
    CHECK_EQ_I(model_cut(even, 0, 10, 256), 3);
    CHECK_EQ_I(model_cut(even, 5, 10, 256), 3);
    CHECK_EQ_I(model_cut(even, 6, 10, 256), 2);
    CHECK_EQ_I(model_cut(even, 9, 10, 79), 1);
    CHECK_EQ_I(model_cut(odd, 0, 4, 100), 1);
    CHECK_EQ_I(model_cut(odd, 1, 4, 100), 1);
    CHECK_EQ_I(model_cut(odd, 2, 4, 100), 2);
}

/* New weights are seen as soon as the version says so: nothing packed is left behind. */
TEST(weights_that_change) {
    for (int i = 0; i < LANGUAGE_MODELS; i++) {
        rlhf_ctx *ctx = test_context("auto", 1);
        rlhf_model *m = model_make(ctx, language_models[i]);
        rlhf_model *fresh = model_make(ctx, language_models[i]);
        batch b;
        batch_fill(&b, m, long_len, 2);
        result r = result_new(m, &b), q = result_new(m, &b);
        go(m, &b, 1, 0, &r);
        for (size_t k = 0; k < m->n; k++) fresh->w[k] = m->w[k] *= 1.25f;
        m->version++;
        go(m, &b, 1, 0, &r);
        go(fresh, &b, 1, 0, &q);
        CHECK_BITS(r.x, q.x, r.nx);
        CHECK_BITS(r.out, q.out, r.n_out);
        result_free(&r), result_free(&q);
        model_drop(m);
        model_drop(fresh);
        rlhf_close(ctx);
    }
}

/* Random weights: their spread, the smaller residual projections of GPT-2, and the score head. */
TEST(initial_weights) {
    rlhf_ctx *ctx = test_context("auto", 1);
    for (int i = 0; i < 2; i++) {
        build b = {i ? llama_score : gpt2_score, NULL};
        CHECK_EQ_I(test_call(ctx, build_run, &b), RLHF_OK);
        rlhf_model *m = b.m;
        static const int params[] = {P_WTE, P_QKV_W, P_UP_W, P_DOWN_W, P_O_W};
        for (int k = 0; k < 5; k++) {
            double sum = 0, want = 0.02 * (k >= 3 && m->c.scaled_init ? sqrt(0.25) : 1);
            const float *w = model_w(m, params[k], 0);
            size_t n = m->slot[params[k]].n;
            for (size_t j = 0; j < n; j++) sum += (double)w[j] * (double)w[j];
            CHECK_NEAR(sqrt(sum / (double)n) / want, 1, 4 / sqrt(2 * (double)n));
        }
        CHECK(model_w(m, P_LN1_W, 1)[3] == 1 && model_w(m, P_SCORE, 0)[3] == 0);
        uint64_t before = model_hash(m);
        model_init_score(m, 3);
        double sum = 0;
        for (int j = 0; j < m->c.d; j++) sum += pow((double)model_w(m, P_SCORE, 0)[j], 2);
        CHECK(model_hash(m) != before && sum > 0.3 && sum < 2.5);
        model_randomize(m, 8);
        CHECK(model_hash(m) != before);
        model_randomize(m, 7);
        CHECK(model_hash(m) == before);
        model_free(m);
    }
    rlhf_close(ctx);
}

/* A weight is a function of seed and place: the formula in plain C gives its bits, in every kernel
 * set, for any number of threads and wherever a piece begins. */
TEST(initial_values_are_box_muller) {
    enum { N = 3001, FROM = 12345 };
    float *w = test_floats(N), *want = test_floats(N);
    for (int i = 0; i < N; i++) {
        uint64_t at = 2 * (uint64_t)(FROM + i);
        float s, c, u = (float)(1.0 - rng_uniform(9, RNG_INIT, at));
        v_sincos1((float)(6.283185307179586 * rng_uniform(9, RNG_INIT, at + 1)), &s, &c);
        want[i] = 0.02f * (sqrtf(-2.0f * v_log1(u)) * c);
    }
    for (int t = 0; t < K_TABLES; t++) {
        if (!k_tables[t]->available()) continue;
        rlhf_ctx *ctx = test_context(k_tables[t]->name, 1 + t % 3);
        model_normals g = {ctx->k, 9, RNG_INIT, FROM, 0.02f, w};
        memset(w, 0, N * sizeof *w);
        par_for(ctx, N, 100, model_normals_range, &g);
        CHECK(!memcmp(w, want, N * sizeof *w));
        rlhf_close(ctx);
    }
    test_floats_free(w), test_floats_free(want);
}

/* ---- errors ---------------------------------------------------------------------------------- */

TEST(bad_batches) {
    static const struct { int len, id; rlhf_status status; const char *text; } cases[] = {
        {71, 0, RLHF_ERR_CONTEXT, "71"}, {5, 37, RLHF_ERR_ARG, "37"}, {5, -1, RLHF_ERR_ARG, "-1"},
        {5, INT32_MAX, RLHF_ERR_ARG, "2147483647"}, {70, 36, RLHF_OK, ""}};
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_model *m = model_make(ctx, gpt2_tied);
    float *x = test_floats(71 * 24), *out = test_floats(71);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int32_t ids[71] = {0};
        ids[cases[i].len - 1] = cases[i].id;
        batch b = {.seqs = 1, .rows = cases[i].len, .tokens = cases[i].len - 1,
                   .len = {cases[i].len}, .ids = {ids}};
        pass p = {m, &b, 0, 0, 1, x, out, NULL};
        CHECK_EQ_I(test_call(ctx, pass_run, &p), cases[i].status);
        CHECK(strstr(rlhf_error(ctx), cases[i].text));
    }
    test_floats_free(x), test_floats_free(out);
    model_drop(m);
    rlhf_close(ctx);
}

TEST(bad_configs) {
    static const struct { const char *config; rlhf_status status; const char *text; } cases[] = {
        {"{'vocab_size':5}", RLHF_ERR_FORMAT, "model_type"},
        {"{'model_type':'bert','vocab_size':5}", RLHF_ERR_UNSUPPORTED, "bert"},
        {"{'model_type':'gpt2'}", RLHF_ERR_FORMAT, "vocab_size"},
        {"{'model_type':'gpt2','vocab_size':0}", RLHF_ERR_FORMAT, "vocab_size"},
        {"{'model_type':'gpt2','vocab_size':'5'}", RLHF_ERR_FORMAT, "vocab_size"},
        {"{'model_type':'gpt2','vocab_size':5,'n_embd':10,'n_layer':1,'n_head':3}", RLHF_ERR_FORMAT,
         "n_head"},
        {"{'model_type':'gpt2','vocab_size':5,'n_embd':9,'n_layer':1,'n_head':3,"
         "'activation_function':'relu'}", RLHF_ERR_UNSUPPORTED, "relu"},
        {"{'model_type':'llama','vocab_size':5,'hidden_size':8,'num_hidden_layers':1,"
         "'num_attention_heads':4,'num_key_value_heads':3,'intermediate_size':8}", RLHF_ERR_FORMAT,
         "heads"},
        {"{'model_type':'llama','vocab_size':5,'hidden_size':12,'num_hidden_layers':1,"
         "'num_attention_heads':4,'intermediate_size':8}", RLHF_ERR_FORMAT, "head_dim 3"},
        {"{'model_type':'llama','vocab_size':5,'hidden_size':8,'num_hidden_layers':1,"
         "'num_attention_heads':4,'intermediate_size':8,'rope_scaling':{'rope_type':'yarn'}}",
         RLHF_ERR_UNSUPPORTED, "yarn"},
        {"{'model_type':'llama','vocab_size':5,'hidden_size':8,'num_hidden_layers':1,"
         "'num_attention_heads':4,'intermediate_size':8,'rope_scaling':{'rope_type':'llama3'}}",
         RLHF_ERR_FORMAT, "factor"},
        {"{'model_type':'llama','vocab_size':5,'hidden_size':8,'num_hidden_layers':1,"
         "'num_attention_heads':4,'intermediate_size':8,'hidden_act':'gelu'}", RLHF_ERR_UNSUPPORTED,
         "gelu"},
        {"{'model_type':'gpt_neox','vocab_size':5,'hidden_size':8,'num_hidden_layers':1,"
         "'num_attention_heads':2,'intermediate_size':8,'rotary_pct':0.25}", RLHF_ERR_FORMAT,
         "rotated"},
        {"{'model_type':'smollm3','vocab_size':5,'hidden_size':8,'num_hidden_layers':2,"
         "'num_attention_heads':2,'intermediate_size':8,'no_rope_layers':[1]}", RLHF_ERR_FORMAT,
         "no_rope_layers"},
        {"{'model_type':'gemma2','vocab_size':5,'hidden_size':8,'num_hidden_layers':1,"
         "'num_attention_heads':2,'intermediate_size':8,'layer_types':['chunked_attention']}",
         RLHF_ERR_FORMAT, "chunked_attention"},
        {"{'model_type':'gemma2','vocab_size':5,'hidden_size':8,'num_hidden_layers':1,"
         "'num_attention_heads':2,'intermediate_size':8,'attn_logit_softcapping':-1}",
         RLHF_ERR_FORMAT, "attn_logit_softcapping"},
        {"{'model_type':'gemma3_text','vocab_size':5,'hidden_size':8,'num_hidden_layers':1,"
         "'num_attention_heads':2,'intermediate_size':8,'use_bidirectional_attention':true}",
         RLHF_ERR_UNSUPPORTED, "bidirectional"}};
    rlhf_ctx *ctx = test_context("auto", 1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        build b = {cases[i].config, NULL};
        CHECK_EQ_I(test_call(ctx, build_run, &b), cases[i].status);
        CHECK(strstr(rlhf_error(ctx), cases[i].text));
    }
    rlhf_close(ctx);
}

/* Any allocation may fail; the model stays usable and gives its bits at the next try. */
TEST(out_of_memory) {
    static const int len[] = {5, 3};
    static const char *const configs[] = {gpt2_tied, llama_grouped, gemma3_local};
    for (int i = 0; i < 3; i++) {
        rlhf_ctx *ctx = test_context("auto", 2);
        rlhf_model *m = model_make(ctx, configs[i]);
        batch b;
        batch_fill(&b, m, len, 2);
        result want = result_new(m, &b), r = result_new(m, &b);
        go(m, &b, 1, 1, &want);
        model_drop(m);
        int64_t failed = 0;
        for (int64_t n = 0; test_next_oom(&n);) {
            build made = {configs[i], NULL};
            rlhf_status status = test_call(ctx, build_run, &made);
            if (status != RLHF_OK) {
                CHECK_EQ_I(status, RLHF_ERR_MEMORY);
                failed++;
                continue;
            }
            test_fail_at(0);
            model_free(made.m);
        }
        m = model_make(ctx, configs[i]);
        for (int64_t n = 0; test_next_oom(&n);) {
            pass p = {m, &b, 1, 1, 1, r.x, r.out, NULL};
            rlhf_status status = test_call(ctx, pass_run, &p);
            arena_free(&m->ws);
            if (status == RLHF_OK) continue;
            CHECK_EQ_I(status, RLHF_ERR_MEMORY);
            failed++;
        }
        CHECK(failed > 4);
        go(m, &b, 1, 1, &r);
        CHECK_BITS(r.x, want.x, r.nx);
        CHECK_BITS(r.out, want.out, r.n_out);
        result_free(&r), result_free(&want);
        model_drop(m);
        rlhf_close(ctx);
    }
}

/* ---- adapters -------------------------------------------------------------------------------- */

typedef struct naming {
    const rlhf_model *m;
    const char *name;
    model_lora lora;
} naming;

static void naming_run(rlhf_ctx *ctx, void *arg) {
    naming *n = arg;
    (void)ctx;
    n->lora.on = 0;
    ckpt_targets(n->m, "target_modules", n->name, &n->lora);
}

/* What PEFT may call a matrix: its name, the end of its path, its path in one layer. */
static void case_names_of_matrices(void) {
    static const struct {
        const char *config, *name;
        unsigned on; /* 0: an error */
    } cases[] = {{gpt2_tied, "c_attn", 1u << LORA_QKV},
                 {gpt2_tied, "auto", 1u << LORA_QKV},
                 {gpt2_tied, "attn.c_proj", 1u << LORA_O},
                 {gpt2_tied, "c_proj", 1u << LORA_O | 1u << LORA_DOWN},
                 {gpt2_tied, "transformer.h.1.mlp.c_proj", 1u << LORA_DOWN},
                 {gpt2_tied, "0.attn.c_attn,h.1.attn.c_attn", 1u << LORA_QKV},
                 {gpt2_tied, "transformer.g.1.mlp.c_proj", 0},
                 {gpt2_tied, "_attn", 0},
                 {llama_grouped, "auto", 1u << LORA_Q | 1u << LORA_V},
                 {llama_grouped, "model.layers.10.mlp.up_proj", 1u << LORA_UP},
                 {llama_grouped, "layers.x.mlp.up_proj", 0},
                 {llama_grouped, "c_attn", 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rlhf_ctx *ctx = test_context("ref", 1);
        rlhf_model *m = model_make(ctx, cases[i].config);
        naming n = {m, cases[i].name, {0}};
        CHECK_EQ_I(test_call(ctx, naming_run, &n), cases[i].on ? RLHF_OK : RLHF_ERR_ARG);
        if (cases[i].on) CHECK_EQ_I(n.lora.on, cases[i].on);
        else CHECK(strstr(rlhf_error(ctx), "all-linear"));
        model_drop(m);
        rlhf_close(ctx);
    }
}

TEST_MAIN(CASE(gradients_gpt2), CASE(gradients_llama), CASE(gradients_families),
          CASE(gradients_scorers), CASE(kernels_and_threads), CASE(the_same_on_every_machine),
          CASE(alone_and_in_a_batch), CASE(micro_batches), CASE(shared_beginnings),
          CASE(who_leads), CASE(scores_of_a_list), CASE(token_by_token),
          CASE(hash_of_weights), CASE(pieces_of_a_batch), CASE(weights_that_change),
          CASE(initial_weights), CASE(initial_values_are_box_muller), CASE(bad_batches),
          CASE(bad_configs), CASE(names_of_matrices), CASE(out_of_memory))
