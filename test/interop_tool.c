/* What test/interop_families.py compares with transformers: logits, log-probabilities, a greedy
 * continuation, gradients and scores of a model directory, as tensors of one safetensors file.
 *
 *     interop_tool DIR TASK.json OUT [forward]
 *
 * TASK.json: {"ids": [[...], ...], "prompt": n, "greedy": n, "weights": [...]}. Writes
 *     OUT/values.safetensors   logits.I, logprobs.I, greedy, scores, sft.NAME, score.NAME
 *     OUT/saved, OUT/scorer    the model as it is saved, and with a random head as a scorer
 * The losses are the mean cross-entropy over all sequences' labels, and sum weights[i] score[i].
 * With "forward", DIR may be an adapter, and there are logits, log-probabilities and the greedy
 * continuation only. */

#define RLHF_MAIN
#define main rlhf_main
#include "rlhf.c"
#undef main

enum { TOOL_SEQS = 8, TOOL_TENSORS = 1024 };

typedef struct tool {
    const char *dir, *task, *out;
    int forward, n, len[TOOL_SEQS], total;
    const int32_t *ids[TOOL_SEQS];
    float weight[TOOL_SEQS];
    ckpt_tensor list[TOOL_TENSORS];
    int count;
} tool;

/* One more tensor to be written; x is kept until the end. */
static void tool_add(tool *t, const char *name, size_t rows, size_t cols, const float *x) {
    ckpt_tensor *o = t->list + t->count++;
    *o = (ckpt_tensor){.rows = rows, .cols = cols, .kind = '4', .data = (float *)(uintptr_t)x};
    snprintf(o->name, sizeof o->name, "%s", name);
}

/* The gradients of a model as its file would hold the weights, with a prefix to their names. */
static void tool_gradients(tool *t, const rlhf_model *m, const char *prefix) {
    for (const model_tensor *f = m->family->tensors; f->name; f++)
        for (int l = 0; l < model_param_layers(m, f->param); l++) {
            ckpt_tensor *o = t->list + t->count++;
            char name[160];
            *o = ckpt_tensor_of(m, f, l, 1);
            snprintf(name, sizeof name, "%s.%.140s", prefix, o->name);
            memcpy(o->name, name, sizeof o->name);
            o->data = m->g + (o->data - m->w);
            o->kind = '4';
        }
}

static void tool_read(rlhf_ctx *ctx, tool *t) {
    json_src src = json_source(ctx, t->task);
    json_t *j = json_read(&src), *ids = json_need_array(&src, j, "ids"), *seq;
    size_t i;
    json_array_foreach(ids, i, seq) {
        int32_t *to = mem_alloc(ctx, json_array_size(seq) * sizeof *to);
        for (size_t k = 0; k < json_array_size(seq); k++)
            to[k] = (int32_t)json_integer_value(json_array_get(seq, k));
        t->ids[i] = to;
        t->len[i] = (int)json_array_size(seq);
        t->total += t->len[i] - 1;
        t->weight[i] =
            (float)json_number_value(json_array_get(json_need_array(&src, j, "weights"), i));
        t->n++;
    }
}

/* Logits and log-probabilities of each sequence alone; the greedy continuation of the first. */
static void tool_forward(rlhf_ctx *ctx, tool *t, rlhf_model *m) {
    char name[64];
    for (int i = 0; i < t->n; i++) {
        size_t n = (size_t)t->len[i], vocab = (size_t)m->c.vocab;
        float *logits = mem_alloc(ctx, n * vocab * sizeof *logits);
        float *logp = mem_alloc(ctx, n * sizeof *logp);
        op_env e = {ctx, &m->ws};
        model_top top = api_states(m, t->ids[i], t->len[i], 0);
        op_weight w = model_head_weight(m, t->len[i]);
        op_rows found = {.logp = logp};
        op_logits(&e, &w, t->len[i], top.h, logits);
        op_vocab_run(&e, &w, t->len[i] - 1, top.h, t->ids[i] + 1, 1, &found, NULL, NULL, NULL);
        snprintf(name, sizeof name, "logits.%d", i);
        tool_add(t, name, n, vocab, logits);
        snprintf(name, sizeof name, "logprobs.%d", i);
        tool_add(t, name, n - 1, 0, logp);
    }
    json_src src = json_source(ctx, t->task);
    json_t *j = json_read(&src);
    int prompt = (int)json_need_int(&src, j, "prompt", 1, 1000);
    int max = (int)json_need_int(&src, j, "greedy", 1, 1000);
    gen_config c = {.max_new = max, .batch = 1, .top_p = 1, .stop = INT_MAX};
    int32_t *out = mem_alloc(ctx, (size_t)max * sizeof *out);
    gen_item item = {.prompt = t->ids[0], .n_prompt = prompt, .out = out};
    arena_reset(&m->ws);
    gen_run(m, &m->ws, &c, &item, 1, NULL);
    float *text = mem_alloc(ctx, (size_t)max * sizeof *text);
    for (int i = 0; i < item.n; i++) text[i] = (float)out[i];
    tool_add(t, "greedy", (size_t)item.n, 0, text);
}

static void tool_coef(void *user, int row, int n, const op_rows *found, float *coef) {
    (void)row, (void)found;
    for (int i = 0; i < n; i++) coef[i] = -1.0f / (float)((tool *)user)->total;
}

/* Gradients of the mean cross-entropy, or of the weighted scores. */
static void tool_backward(rlhf_ctx *ctx, tool *t, rlhf_model *m) {
    int score = m->c.head == RLHF_HEAD_SCORE, n = 0;
    arena *ws = &m->ws;
    m->g = mem_zalloc(ctx, m->n, sizeof *m->g);
    arena_reset(ws);
    op_env e = {ctx, ws};
    model_run run = model_batch(ws, t->n, t->ids, t->len, NULL);
    run.save = 1;
    int *row = arena_alloc(ws, (size_t)run.rows * sizeof *row);
    int32_t *target = arena_alloc(ws, (size_t)run.rows * sizeof *target);
    for (int i = 0; i < t->n; i++)
        for (int k = score ? t->len[i] - 1 : 0; k < t->len[i] - !score; k++) {
            target[n] = score ? 0 : t->ids[i][k + 1];
            row[n++] = run.seq[i].row + k;
        }
    model_forward(m, ws, &run);
    model_top top = model_top_fwd(m, ws, run.x, row, n);
    if (score) {
        float *out = mem_alloc(ctx, (size_t)n * sizeof *out);
        model_scores(m, ws, &top, out);
        tool_add(t, "scores", (size_t)n, 0, out);
        float *dh = arena_floats(ws, (size_t)n, (size_t)m->c.d);
        model_scores_bwd(m, ws, &top, t->weight, dh);
        model_backward(m, ws, &run, model_top_bwd(m, ws, &top, dh, run.rows));
    } else {
        op_rows found = {.logp = arena_floats(ws, (size_t)n, 1)};
        float *dh = arena_floats(ws, (size_t)n, (size_t)m->c.d);
        op_weight w = model_head_weight(m, n);
        op_vocab_run(&e, &w, n, top.h, target, 1, &found, tool_coef, t, dh);
        model_backward(m, ws, &run, model_top_bwd(m, ws, &top, dh, run.rows));
    }
    tool_gradients(t, m, score ? "score" : "sft");
}

static rlhf_status tool_run(rlhf_ctx *context, tool *t) {
    API_ENTER(context);
    rlhf_model *m = ckpt_open(api_ctx, t->dir);
    tool_read(api_ctx, t);
    io_mkdirs(api_ctx, t->out);
    tool_forward(api_ctx, t, m);
    if (t->forward) {
        ckpt_write(api_ctx, ckpt_path(api_ctx, t->out, "values.safetensors"), t->list, t->count);
        API_LEAVE();
    }
    model_thaw(m);
    tool_backward(api_ctx, t, m);
    ckpt_save(m, ckpt_path(api_ctx, t->out, "saved"), '4');
    rlhf_model *s = ckpt_clone(m, RLHF_HEAD_SCORE);
    model_init_score(s, 3);
    s->score_trained = 1;
    tool_backward(api_ctx, t, s);
    ckpt_save(s, ckpt_path(api_ctx, t->out, "scorer"), '4');
    ckpt_write(api_ctx, ckpt_path(api_ctx, t->out, "values.safetensors"), t->list, t->count);
    API_LEAVE();
}

int main(int argc, char **argv) {
    static tool t;
    rlhf_ctx *ctx;
    rlhf_options options = rlhf_options_default();
    options.threads = 1;
    if (argc < 4 || rlhf_open(&ctx, &options) != RLHF_OK) return 2;
    t.dir = argv[1], t.task = argv[2], t.out = argv[3], t.forward = argc > 4;
    rlhf_status status = tool_run(ctx, &t);
    if (status != RLHF_OK) fprintf(stderr, "%s\n", rlhf_error(ctx));
    return status != RLHF_OK;
}
