/* The operations. Each is defined here a second time in double precision, forward
 * only; its gradient is the central difference of that definition, which single precision has to
 * meet. Then the bits: any kernels, any threads, a row alone or in a batch, a sequence at once or
 * token by token. */

#include "../rlhf.c"
#include "test.h"

/* ---- helpers --------------------------------------------------------------------------------- */

/* Computes everything that a test looks at into out, which begins as poison. */
typedef void op_run(rlhf_ctx *ctx, const void *data, float *out);

/* Runs it with every table and 1, 2, 3 and 5 threads: always the same bits, which are returned. */
static float *run_everywhere(op_run *run, const void *data, size_t n) {
    static const int threads[] = {1, 2, 3, 5};
    float *first = NULL;
    for (int t = K_TABLES - 1; t >= 0; t--)
        for (int i = 0; i < 4; i++) {
            /* The kernels do not know the number of threads: once is enough for the slow ones. */
            if (!k_tables[t]->available() || (i && (t == K_TABLES - 1 || test_quick()))) continue;
            rlhf_ctx *ctx = test_context(k_tables[t]->name, threads[i]);
            float *out = test_floats(n);
            run(ctx, data, out);
            CHECK(test_margins(out, n));
            int before = test_failures;
            if (first) CHECK_BITS(out, first, n);
            if (test_failures > before)
                test_fail(__FILE__, __LINE__, "above: %s, %d threads", ctx->k->name, ctx->threads);
            rlhf_close(ctx);
            if (first) test_floats_free(out);
            else first = out;
        }
    return first;
}

static double *doubles(const float *x, size_t n) {
    double *d = malloc((n + 1) * sizeof *d);
    for (size_t i = 0; i < n; i++) d[i] = (double)x[i];
    return d;
}

static float *floats(size_t n, float low, float high) {
    float *x = test_floats(n);
    test_fill(x, n, low, high);
    return x;
}

/* Weighted sum of outputs in double precision, a function of what arg holds. */
typedef double loss_fn(const void *arg);

/* Compares `count` entries of the gradient of x[n] (all, if n is no more) with differences. base is
 * what the gradient was added to; tolerances are relative to the largest difference seen. */
static void check_grad(const char *what, double *x, size_t n, const float *got, float base,
                       int count, loss_fn *loss, const void *arg) {
    double worst = 0, top = 1e-3;
    size_t at = 0;
    bool all = n <= (size_t)count;
    for (size_t i = 0; i < (all ? n : (size_t)count); i++) {
        size_t j = all ? i : (size_t)test_int(0, (int64_t)n - 1);
        double keep = x[j], h = 1e-4;
        x[j] = keep + h;
        double up = loss(arg);
        x[j] = keep - h;
        double slope = (up - loss(arg)) / (2 * h);
        double off = fabs(slope - ((double)got[j] - (double)base));
        x[j] = keep;
        if (fabs(slope) > top) top = fabs(slope);
        if (!(off <= worst)) worst = off, at = j;
    }
    if (!(worst <= 2e-5 * top))
        test_fail(__FILE__, __LINE__, "%s: gradient [%zu] is off by %.3g, the largest is %.3g",
                  what, at, worst, top);
}

static void check_near(const char *what, const float *got, const double *want, size_t n) {
    double top = 1, worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        if (fabs(want[i]) > top) top = fabs(want[i]);
        double off = fabs((double)got[i] - want[i]);
        if (!(off <= worst)) worst = off, at = i;
    }
    if (!(worst <= 3e-6 * top))
        test_fail(__FILE__, __LINE__, "%s[%zu] is off by %.3g", what, at, worst);
}

static const float BASE = 0.25f; /* what accumulated gradients start at */

static float *fill(float *x, size_t n, float value) {
    for (size_t i = 0; i < n; i++) x[i] = value;
    return x;
}

/* ---- norms ----------------------------------------------------------------------------------- */

typedef struct norm_case {
    int rows, n, ln, base;
    float *x, *w, *b, *dy;
    double *X, *W, *B, *DY;
} norm_case;

static const float norm_eps = 1e-3f;

/* out: y, dx, gw, gb */
static void norm_run(rlhf_ctx *ctx, const void *data, float *out) {
    const norm_case *c = data;
    size_t n = (size_t)c->n, all = (size_t)c->rows * n;
    float *stats = floats(2 * (size_t)c->rows, 0, 1);
    arena ws = {.ctx = ctx};
    op_env e = {ctx, &ws};
    op_norm o = {.k = ctx->k, .n = c->n, .eps = norm_eps, .base = (float)c->base, .w = c->w,
                 .b = c->ln ? c->b : NULL,
                 .gw = fill(out + 2 * all, n, BASE), .gb = fill(out + 2 * all + n, n, BASE),
                 .x = c->x, .y = out, .mean = stats, .rstd = stats + c->rows, .dy = c->dy,
                 .dx = fill(out + all, all, BASE), .rows = c->rows};
    op_norm_fwd(&e, &o);
    op_norm_bwd(&e, &o);
    arena_free(&ws);
    test_floats_free(stats);
}

static void norm_define(const norm_case *c, int row, double *y) {
    const double *x = c->X + row * c->n;
    double mean = 0, var = 0;
    for (int i = 0; c->ln && i < c->n; i++) mean += x[i] / c->n;
    for (int i = 0; i < c->n; i++) var += (x[i] - mean) * (x[i] - mean) / c->n;
    for (int i = 0; i < c->n; i++)
        y[i] = (x[i] - mean) / sqrt(var + (double)norm_eps) * (c->base + c->W[i]) +
               (c->ln ? c->B[i] : 0);
}

static double norm_loss(const void *arg) {
    const norm_case *c = arg;
    double sum = 0, y[128];
    for (int r = 0; r < c->rows; r++) {
        norm_define(c, r, y);
        for (int i = 0; i < c->n; i++) sum += y[i] * c->DY[r * c->n + i];
    }
    return sum;
}

static void norm_check(int rows, int n, int ln, int base) {
    size_t all = (size_t)(rows * n), wide = (size_t)n;
    norm_case c = {rows, n, ln, base, floats(all, -2, 3), floats(wide, -1, 2), floats(wide, -1, 1),
                   floats(all, -1, 1), NULL, NULL, NULL, NULL};
    c.X = doubles(c.x, all), c.W = doubles(c.w, wide);
    c.B = doubles(c.b, wide), c.DY = doubles(c.dy, all);
    float *out = run_everywhere(norm_run, &c, 2 * all + 2 * wide);
    double *y = malloc(all * sizeof *y);
    for (int r = 0; r < rows; r++) norm_define(&c, r, y + r * n);
    check_near("y", out, y, all);
    check_grad("x", c.X, all, out + all, BASE, 60, norm_loss, &c);
    check_grad("weight", c.W, wide, out + 2 * all, BASE, 40, norm_loss, &c);
    if (ln) check_grad("bias", c.B, wide, out + 2 * all + wide, BASE, 40, norm_loss, &c);
    free(y), free(c.X), free(c.W), free(c.B), free(c.DY);
    test_floats_free(out), test_floats_free(c.x), test_floats_free(c.w);
    test_floats_free(c.b), test_floats_free(c.dy);
}

TEST(layer_norm) {
    norm_check(1, 1, 1, 0);
    norm_check(5, 16, 1, 0);
    norm_check(23, 53, 1, 0);
}

TEST(rms_norm) {
    norm_check(1, 1, 0, 0);
    norm_check(5, 16, 0, 0);
    norm_check(5, 16, 0, 1);
    norm_check(23, 53, 0, 0);
    norm_check(23, 53, 0, 1);
}

/* ---- linear ---------------------------------------------------------------------------------- */

typedef struct linear_case {
    int m, n, k, add;
    float *x, *w, *b, *dy;
    double *X, *W, *B, *DY;
} linear_case;

/* out: y, dx, gw, gb */
static void linear_run(rlhf_ctx *ctx, const void *data, float *out) {
    const linear_case *c = data;
    size_t m = (size_t)c->m, n = (size_t)c->n, k = (size_t)c->k;
    float *y = fill(out, m * n, BASE), *dx = y + m * n;
    float *packed = test_floats(gemm_packed_size(ctx->k, 0, c->k, c->n));
    float *gw = fill(dx + m * k, n * k, BASE), *gb = fill(gw + n * k, n, BASE);
    arena ws = {.ctx = ctx};
    op_env e = {ctx, &ws};
    op_weight w = {.n = c->n, .k = c->k, .w = c->w, .b = c->b, .packed = packed,
                   .gw = gw, .gb = gb};
    gemm_pack_args g = {.s = {.w = c->w, .ks = 1, .ns = k}, .k = c->k, .n = c->n, .out = packed};
    gemm_pack(ctx, &g);
    op_linear(&e, &w, c->m, c->x, y, c->add ? y : NULL, NULL, NULL);
    op_linear_bwd_w(&e, &w, c->m, c->x, c->dy);
    op_linear_bwd_x(&e, &w, c->m, c->dy, dx);
    w.gw = NULL;
    op_linear_bwd_w(&e, &w, c->m, c->x, c->dy); /* frozen: nothing happens */
    arena_free(&ws);
    test_floats_free(packed);
}

static double linear_define(const linear_case *c, int i, int j) {
    double y = c->B[j] + (c->add ? (double)BASE : 0);
    for (int k = 0; k < c->k; k++) y += c->X[i * c->k + k] * c->W[j * c->k + k];
    return y;
}

static double linear_loss(const void *arg) {
    const linear_case *c = arg;
    double sum = 0;
    for (int i = 0; i < c->m; i++)
        for (int j = 0; j < c->n; j++) sum += c->DY[i * c->n + j] * linear_define(c, i, j);
    return sum;
}

static void linear_check(int m, int n, int k, int add) {
    size_t y = (size_t)(m * n), x = (size_t)(m * k), w = (size_t)(n * k);
    linear_case c = {m, n, k, add, floats(x, -1, 1), floats(w, -1, 1), floats((size_t)n, -1, 1),
                     floats(y, -1, 1), NULL, NULL, NULL, NULL};
    c.X = doubles(c.x, x), c.W = doubles(c.w, w);
    c.B = doubles(c.b, (size_t)n), c.DY = doubles(c.dy, y);
    float *out = run_everywhere(linear_run, &c, y + x + w + (size_t)n);
    double *want = malloc(y * sizeof *want);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) want[i * n + j] = linear_define(&c, i, j);
    check_near("y", out, want, y);
    check_grad("x", c.X, x, out + y, 0, 30, linear_loss, &c);
    check_grad("weight", c.W, w, out + y + x, BASE, 30, linear_loss, &c);
    check_grad("bias", c.B, (size_t)n, out + y + x + w, BASE, 30, linear_loss, &c);
    free(want), free(c.X), free(c.W), free(c.B), free(c.DY);
    test_floats_free(out), test_floats_free(c.x), test_floats_free(c.w);
    test_floats_free(c.b), test_floats_free(c.dy);
}

TEST(linear) {
    linear_check(1, 1, 1, 0);
    linear_check(3, 17, 9, 1);
    linear_check(25, 40, 33, 0);
    linear_check(61, 70, 50, 1);
}

/* A matrix as a file of bfloat16 or half precision has it, in one of four forms: as it is,
 * transposed, with the heads' queries, keys and values in turn, in three pieces whose rows share
 * panels. */
enum { NARROW_N = 66, NARROW_K = 37 };
typedef struct narrow_case {
    int m, form, half;
    char kind;
    float *x, *dy;
    uint16_t *h;
} narrow_case;

static void narrow_run(rlhf_ctx *ctx, const void *data, float *out) {
    const narrow_case *c = data;
    arena ws = {.ctx = ctx};
    op_env e = {ctx, &ws};
    op_weight w = {.n = NARROW_N, .k = NARROW_K, .half = c->half,
                   .pieces = c->form == 3 ? 3 : 1};
    static const int rows[] = {30, 17, 19};
    const uint16_t *at = c->h;
    for (int i = 0; i < w.pieces; i++) {
        w.piece[i] = (op_piece){.data = (const unsigned char *)at, .cols = NARROW_K,
                                .kind = c->kind,
                                .rows = w.pieces > 1 ? rows[i] : NARROW_N,
                                .transposed = c->form == 1, .hd = c->form == 2 ? 11 : 0};
        at += w.piece[i].rows * NARROW_K;
    }
    CHECK(op_is_narrow(&w) == !c->half);
    /* From the file: y, then dx. */
    size_t n = (size_t)c->m * NARROW_N, all = n + (size_t)c->m * NARROW_K;
    op_linear(&e, &w, c->m, c->x, out, NULL, NULL, NULL);
    op_linear_bwd_x(&e, &w, c->m, c->dy, out + n);
    size_t size = gemm_packed_size(ctx->k, c->half, w.k, w.n);
    float *room = test_floats(c->half ? size : (size + 1) / 2), *y = test_floats(all);
    uint16_t *bits = (uint16_t *)(void *)room;
    int panels = (int)gemm_panels(w.n);
    for (int lo = 0, hi; lo < panels; lo = hi) {
        hi = lo + 2 < panels ? lo + 2 : panels;
        if (c->half) op_pack(&e, &w, lo, hi, room);
        else op_narrow(&e, &w, lo, hi, bits);
    }
    if (c->half) w.packed = room;
    else w.narrow = bits;
    op_linear(&e, &w, c->m, c->x, y, NULL, NULL, NULL);
    op_linear_bwd_x(&e, &w, c->m, c->dy, y + n);
    CHECK_BITS(y, out, all);
    CHECK(test_margins(y, all) && test_margins(room, c->half ? size : (size + 1) / 2));
    /* Sums of bfloat16 are those of the instruction set. */
    if (c->half) memset(out, 0, all * sizeof *out);
    w.half = 0, w.piece[w.pieces - 1].kind = '4';
    CHECK(!op_is_narrow(&w));
    w.piece[w.pieces - 1].kind = c->kind == 'h' ? 'b' : 'h';
    CHECK(op_is_narrow(&w) == (w.pieces == 1));
    arena_free(&ws);
    test_floats_free(room), test_floats_free(y);
}

/* Row 5 of W and its column 5, by definition: of the first head's queries where these come in turn,
 * whose other rows are elsewhere. */
static void narrow_by_hand(const narrow_case *c, const float *y) {
    double want = 0, back = 0;
    const float *dx = y + c->m * NARROW_N;
    for (int k = 0; k < NARROW_K; k++) {
        uint16_t h = c->h[c->form == 1 ? k * NARROW_N + 5 : 5 * NARROW_K + k];
        want += (double)c->x[k] * (double)(c->kind == 'h' ? v_ieee1(h) : v_wide1(h));
    }
    CHECK_NEAR(y[5], want, 1e-5);
    for (int r = 0; r < NARROW_N; r++) {
        uint16_t h = c->h[c->form == 1 ? 5 * NARROW_N + r : r * NARROW_K + 5];
        back += (double)c->dy[r] * (double)(c->kind == 'h' ? v_ieee1(h) : v_wide1(h));
    }
    if (c->form != 2) CHECK_NEAR(dx[5], back, 2e-5);
}

/* Panels give the bits that the file gives, for few rows and for many, in both directions. */
TEST(linear_narrow) {
    static const int ms[] = {1, 3, 6, 8, 9, 31, 40, 110};
    static uint16_t h[NARROW_N * NARROW_K];
    for (int form = 0; form < 16; form++)
        for (size_t i = 0; i < sizeof ms / sizeof *ms; i++) {
            narrow_case c = {.m = ms[i], .form = form % 4, .half = form / 4 % 2, .h = h,
                             .kind = form / 8 ? 'h' : 'b'};
            for (size_t j = 0; j < sizeof h / sizeof *h; j++) {
                float x = (float)test_int(-999, 999) / 999;
                h[j] = c.kind == 'h' ? ckpt_to_half(x) : v_half1(x);
            }
            c.x = floats((size_t)(c.m * NARROW_K), -1, 1);
            c.dy = floats((size_t)(c.m * NARROW_N), -1, 1);
            float *y = run_everywhere(narrow_run, &c, (size_t)(c.m * (NARROW_N + NARROW_K)));
            if (!c.half) narrow_by_hand(&c, y);
            test_floats_free(y), test_floats_free(c.x), test_floats_free(c.dy);
        }
}

/* ---- embedding ------------------------------------------------------------------------------- */

typedef struct embed_case {
    int rows, d, vocab, positions;
    int32_t *ids, *pos;
    float *wte, *wpe, *dx;
} embed_case;

/* out: x, gwte, gwpe */
static void embed_run(rlhf_ctx *ctx, const void *data, float *out) {
    const embed_case *c = data;
    size_t d = (size_t)c->d, all = (size_t)c->rows * d;
    arena ws = {.ctx = ctx};
    op_env e = {ctx, &ws};
    op_weight wte = {.n = c->vocab, .k = c->d, .w = c->wte};
    op_embed o = {.k = ctx->k, .rows = c->rows, .d = c->d, .ids = c->ids, .pos = c->pos,
                  .wte = &wte, .wpe = c->positions ? c->wpe : NULL, .x = out};
    op_embed_fwd(&e, &o);
    o.gwte = fill(out + all, (size_t)c->vocab * d, BASE);
    float *gwpe = fill(o.gwte + (size_t)c->vocab * d, (size_t)c->positions * d, BASE);
    o.gwpe = c->positions ? gwpe : NULL;
    o.x = c->dx;
    op_embed_bwd(&e, &o);
    arena_free(&ws);
}

static void embed_check(int rows, int d, int vocab, int positions) {
    size_t all = (size_t)(rows * d), v = (size_t)(vocab * d), p = (size_t)(positions * d);
    embed_case c = {rows, d, vocab, positions, malloc((size_t)rows * sizeof(int32_t)),
                    malloc((size_t)rows * sizeof(int32_t)), floats(v, -1, 1), floats(p, -1, 1),
                    floats(all, -1, 1)};
    for (int r = 0; r < rows; r++) {
        c.ids[r] = (int32_t)test_int(0, vocab - 1);
        c.pos[r] = positions ? (int32_t)test_int(0, positions - 1) : 0;
    }
    float *out = run_everywhere(embed_run, &c, all + v + p), *want = test_floats(all + v + p);
    fill(want + all, v + p, BASE);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < d; i++) {
            size_t at = (size_t)(r * d + i), te = (size_t)(c.ids[r] * d + i);
            size_t pe = (size_t)(c.pos[r] * d + i);
            want[at] = positions ? c.wte[te] + c.wpe[pe] : c.wte[te];
            want[all + te] += c.dx[at]; /* in the order of rows */
            if (positions) want[all + v + pe] += c.dx[at];
        }
    CHECK_BITS(out, want, all + v + p);
    free(c.ids), free(c.pos);
    test_floats_free(out), test_floats_free(want), test_floats_free(c.wte);
    test_floats_free(c.wpe), test_floats_free(c.dx);
}

/* Only the rows of tokens take memory, whatever order they come in; cleared, all is zero again. */
TEST(embedding_of_few_tokens) {
    enum { VOCAB = 1000, D = 5, ROWS = 300 };
    rlhf_ctx *ctx = test_context("auto", 2);
    op_env e = {ctx, NULL};
    float *dx = floats(ROWS * D, -1, 1);
    float *part = test_floats(VOCAB * D), *dense = test_floats(VOCAB * D);
    op_sparse *s = op_sparse_new(ctx, VOCAB, D);
    for (int most = 1; most <= VOCAB; most *= 10) {
        int32_t ids[ROWS];
        for (int r = 0; r < ROWS; r++) ids[r] = (int32_t)(VOCAB - 1 - test_int(0, most - 1));
        memset(dense, 0, VOCAB * D * sizeof *dense);
        memset(part, 0, VOCAB * D * sizeof *part);
        /* Two batches continue one chain. */
        for (int i = 0; i < 2; i++) {
            op_embed o = {.k = ctx->k, .rows = ROWS / 2, .d = D, .ids = ids + i * ROWS / 2,
                          .gwte = dense, .x = dx + i * (ROWS / 2) * D};
            op_embed_bwd(&e, &o);
            o.gwte = NULL, o.sparse = s;
            op_embed_bwd(&e, &o);
        }
        CHECK(s->n <= most && (most > 1 || s->n == 1));
        for (int i = 0; i < s->n; i++)
            memcpy(part + s->id[i] * D, op_sparse_row(s, i), D * sizeof *part);
        CHECK_BITS(part, dense, VOCAB * D);
        op_sparse_clear(s);
        int blocks = 0;
        for (int i = 0; i <= VOCAB / OP_SPARSE; i++) blocks += s->block[i] != NULL;
        CHECK(blocks <= (base_min(most, ROWS) + OP_SPARSE - 1) / OP_SPARSE);
    }
    op_sparse_reserve(s, VOCAB + 1);
    for (int i = 0; i < VOCAB; i++)
        for (int k = 0; k < D; k++) CHECK(op_sparse_row(s, i)[k] == 0);
    op_sparse_free(s);
    test_floats_free(dx), test_floats_free(part), test_floats_free(dense);
    rlhf_close(ctx);
}

TEST(embedding) {
    embed_check(1, 1, 1, 1);
    embed_check(40, 20, 7, 11);
    embed_check(70, 100, 50, 0);
}

/* ---- activations ----------------------------------------------------------------------------- */

typedef struct act_case {
    int rows, n, other; /* other: the exact gelu; geglu */
    float *x, *dy;
    double *X, *DY;
} act_case;

static void gelu_run(rlhf_ctx *ctx, const void *data, float *out) {
    const act_case *c = data;
    size_t all = (size_t)(c->rows * c->n);
    (c->other ? ctx->k->gelu_erf : ctx->k->gelu)((int)all, c->x, out);
    memcpy(out + all, c->dy, all * sizeof *out);
    k_act_bwd_fn *bwd = c->other ? ctx->k->gelu_erf_bwd : ctx->k->gelu_bwd;
    op_gelu o = {bwd, c->n, memcpy(out + 2 * all, c->x, all * sizeof *out), out + all};
    par_for(ctx, c->rows, 4, op_gelu_bwd_rows, &o);
}

static double gelu_define(const act_case *c, double x) {
    if (c->other) return 0.5 * x * (1 + erf(x / sqrt(2)));
    return 0.5 * x * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
}

static double gelu_loss(const void *arg) {
    const act_case *c = arg;
    double sum = 0;
    for (int i = 0; i < c->rows * c->n; i++) sum += c->DY[i] * gelu_define(c, c->X[i]);
    return sum;
}

static void gelu_check(int other) {
    size_t all = 9 * 37;
    act_case c = {9, 37, other, floats(all, -6, 6), floats(all, -1, 1), NULL, NULL};
    c.X = doubles(c.x, all), c.DY = doubles(c.dy, all);
    float *out = run_everywhere(gelu_run, &c, 3 * all);
    CHECK(!memcmp(out, out + 2 * all, all * sizeof *out)); /* backward makes the same y */
    double *y = malloc(all * sizeof *y);
    for (size_t i = 0; i < all; i++) y[i] = gelu_define(&c, c.X[i]);
    check_near("y", out, y, all);
    check_grad("x", c.X, all, out + all, 0, 1000, gelu_loss, &c);
    free(y), free(c.X), free(c.DY);
    test_floats_free(out), test_floats_free(c.x), test_floats_free(c.dy);
}

TEST(gelu) { gelu_check(0); }
TEST(gelu_exact) { gelu_check(1); }

static void glu_run(rlhf_ctx *ctx, const void *data, float *out) {
    const act_case *c = data;
    size_t all = (size_t)(c->rows * c->n);
    op_glu o = {.act = c->other ? ctx->k->geglu : ctx->k->glu,
                .act_bwd = c->other ? ctx->k->geglu_bwd : ctx->k->glu_bwd,
                .ff = c->n, .up = memcpy(out + all, c->x, 2 * all * sizeof *out), .y = out};
    par_for(ctx, c->rows, 4, op_glu_rows, &o);
    o.y = memcpy(out + 3 * all, c->dy, all * sizeof *out);
    par_for(ctx, c->rows, 4, op_glu_bwd_rows, &o);
}

static double glu_define(const act_case *c, int r, int i) {
    double gate = c->X[2 * r * c->n + i], up = c->X[(2 * r + 1) * c->n + i];
    act_case tanh_form = {0};
    return (c->other ? gelu_define(&tanh_form, gate) : gate / (1 + exp(-gate))) * up;
}

static double glu_loss(const void *arg) {
    const act_case *c = arg;
    double sum = 0;
    for (int r = 0; r < c->rows; r++)
        for (int i = 0; i < c->n; i++) sum += c->DY[r * c->n + i] * glu_define(c, r, i);
    return sum;
}

static void glu_check(int other) {
    size_t all = 9 * 37;
    act_case c = {9, 37, other, floats(2 * all, -6, 6), floats(all, -1, 1), NULL, NULL};
    c.X = doubles(c.x, 2 * all), c.DY = doubles(c.dy, all);
    float *out = run_everywhere(glu_run, &c, 4 * all);
    CHECK(!memcmp(out, out + 3 * all, all * sizeof *out)); /* backward makes the same y */
    double *y = malloc(all * sizeof *y);
    for (int i = 0; i < (int)all; i++) y[i] = glu_define(&c, i / c.n, i % c.n);
    check_near("y", out, y, all);
    check_grad("x", c.X, 2 * all, out + all, 0, 1000, glu_loss, &c);
    free(y), free(c.X), free(c.DY);
    test_floats_free(out), test_floats_free(c.x), test_floats_free(c.dy);
}

TEST(glu) { glu_check(0); }
TEST(geglu) { glu_check(1); }

/* ---- attention ------------------------------------------------------------------------------- */

typedef struct attn_case {
    int heads, kv_heads, hd, rope, seqs, rows;
    const int *len, *past; /* past: led by the last sequence without; null: none */
    int32_t *pos;
    float *qkv, *dout, *cosine, *sine;
    double *QKV, *DOUT;
    int first, count; /* rows of the sequence that attn_loss computes */
    int rot, window;
    float cap;
    int half; /* keys and values rounded to bfloat16 */
} attn_case;

static int attn_width(const attn_case *c) { return (c->heads + 2 * c->kv_heads) * c->hd; }

/* The caches hold NaN where no key or value is; narrow: numbers of sixteen bits. */
static op_kv kv_new(const attn_case *c, int cap, int narrow) {
    cap = (int)base_round_up((size_t)cap, RLHF_LANES);
    return (op_kv){test_floats(op_kv_floats(narrow, op_kv_k_size(c->kv_heads, c->hd, cap))),
                   test_floats(op_kv_floats(narrow, op_kv_v_size(c->kv_heads, c->hd, cap))), cap,
                   narrow};
}

static op_attn attn_args(rlhf_ctx *ctx, const attn_case *c) {
    return (op_attn){.kt = ctx->k, .heads = c->heads, .kv_heads = c->kv_heads, .hd = c->hd,
                     .cosine = c->rope ? c->cosine : NULL, .sine = c->sine, .sign = 1,
                     .rot = c->rot, .window = c->window, .cap = c->cap, .half = c->half,
                     .scale = 1.0f / sqrtf((float)c->hd)};
}

/* out: o, dqkv */
static void attn_run(rlhf_ctx *ctx, const void *data, float *out) {
    const attn_case *c = data;
    size_t rows = (size_t)c->rows, wide = (size_t)attn_width(c);
    size_t o = rows * (size_t)(c->heads * c->hd);
    float *qkv = test_floats(rows * wide), *lse = test_floats(rows * (size_t)c->heads);
    memcpy(qkv, c->qkv, rows * wide * sizeof *qkv);
    arena ws = {.ctx = ctx};
    op_env e = {ctx, &ws};
    op_seq *seq = malloc((size_t)c->seqs * sizeof *seq);
    for (int s = 0, row = 0, lead = 0; s < c->seqs; row += c->len[s++]) {
        int past = c->past ? c->past[s] : 0;
        if (!past) lead = row;
        seq[s] = (op_seq){.row = row, .n = c->len[s], .past = past, .lead = lead, .led = past,
                          .kv = kv_new(c, past + c->len[s], 0)};
    }
    op_attn a = attn_args(ctx, c);
    a.seqs = c->seqs, a.seq = seq, a.rows = c->rows, a.pos = c->pos;
    a.qkv = qkv, a.o = out, a.lse = lse, a.dout = c->dout;
    a.dqkv = fill(out + o, rows * wide, 0);
    op_rope(&e, &a);
    op_attn_fwd(&e, &a);
    op_attn_bwd(&e, &a);
    a.qkv = a.dqkv;
    a.sign = -1;
    op_rope(&e, &a);
    for (int s = 0; s < c->seqs; s++) {
        CHECK(test_margins(seq[s].kv.k, op_kv_k_size(c->kv_heads, c->hd, seq[s].kv.cap)));
        CHECK(test_margins(seq[s].kv.v, op_kv_v_size(c->kv_heads, c->hd, seq[s].kv.cap)));
        test_floats_free(seq[s].kv.k), test_floats_free(seq[s].kv.v);
    }
    free(seq);
    arena_free(&ws);
    test_floats_free(qkv), test_floats_free(lse);
}

/* Element j of row r's head h (counting queries, keys, values), rotated unless it is a value. */
static double attn_element(const attn_case *c, int r, int h, int j) {
    const double *x = c->QKV + (size_t)r * (size_t)attn_width(c) + h * c->hd;
    if (!c->rope || h >= c->heads + c->kv_heads || j >= c->rot) return x[j];
    int half = c->rot / 2, i = j % half;
    double cosine = (double)c->cosine[c->pos[r] * half + i];
    double sine = (double)c->sine[c->pos[r] * half + i];
    return j < half ? x[i] * cosine - x[half + i] * sine : x[half + i] * cosine + x[i] * sine;
}

/* Output of one head of rows [first, first + count), which are one sequence: o [count][hd]. */
static void attn_define(const attn_case *c, int first, int count, int h, double *o) {
    int g = h / (c->heads / c->kv_heads), hd = c->hd;
    double *x = malloc(3 * (size_t)(count * hd) * sizeof *x);
    double *p = malloc((size_t)count * sizeof *p);
    for (int r = 0; r < count; r++)
        for (int j = 0; j < hd; j++) {
            x[r * hd + j] = attn_element(c, first + r, h, j);
            x[(count + r) * hd + j] = attn_element(c, first + r, c->heads + g, j);
            x[(2 * count + r) * hd + j] = attn_element(c, first + r, c->heads + c->kv_heads + g, j);
        }
    for (int r = 0; r < count; r++) {
        double max = -1e300, sum = 0, *q = x + r * hd, cap = (double)c->cap;
        int from = c->window ? base_max(0, r - c->window + 1) : 0;
        for (int t = from; t <= r; t++) {
            double dot = 0, *k = x + (count + t) * hd;
            for (int j = 0; j < hd; j++) dot += q[j] * k[j];
            p[t] = dot / sqrt(hd);
            if (cap > 0) p[t] = cap * tanh(p[t] / cap);
            max = fmax(max, p[t]);
        }
        for (int t = from; t <= r; t++) sum += p[t] = exp(p[t] - max);
        for (int j = 0; j < hd; j++) {
            o[r * hd + j] = 0;
            for (int t = from; t <= r; t++)
                o[r * hd + j] += p[t] / sum * x[(2 * count + t) * hd + j];
        }
    }
    free(x), free(p);
}

static double attn_loss(const void *arg) {
    const attn_case *c = arg;
    double sum = 0, *o = malloc((size_t)(c->count * c->hd) * sizeof *o);
    for (int h = 0; h < c->heads; h++) {
        attn_define(c, c->first, c->count, h, o);
        for (int r = 0; r < c->count; r++)
            for (int j = 0; j < c->hd; j++)
                sum += o[r * c->hd + j] * c->DOUT[((c->first + r) * c->heads + h) * c->hd + j];
    }
    free(o);
    return sum;
}

static attn_case attn_new(int heads, int kv_heads, int hd, int rope, const int *len, int seqs) {
    attn_case c = {.heads = heads, .kv_heads = kv_heads, .hd = hd, .rope = rope, .seqs = seqs,
                   .len = len, .rot = hd};
    int longest = 0, half = hd / 2;
    for (int s = 0; s < seqs; s++) {
        c.rows += len[s];
        if (len[s] > longest) longest = len[s];
    }
    size_t rows = (size_t)c.rows, q = (size_t)(heads * hd), wide = (size_t)attn_width(&c);
    c.pos = malloc(rows * sizeof *c.pos);
    for (int s = 0, row = 0; s < seqs; s++)
        for (int t = 0; t < len[s]; t++) c.pos[row++] = t;
    c.qkv = floats(rows * wide, -2, 2);
    c.dout = floats(rows * q, -1, 1);
    c.cosine = test_floats((size_t)(longest * half));
    c.sine = test_floats((size_t)(longest * half));
    for (int i = 0; i < longest * half; i++) {
        double angle = i / half / pow(100, (double)(i % half) / half);
        c.cosine[i] = (float)cos(angle);
        c.sine[i] = (float)sin(angle);
    }
    c.QKV = doubles(c.qkv, rows * wide);
    c.DOUT = doubles(c.dout, rows * q);
    return c;
}

static void attn_free(attn_case *c) {
    free(c->pos), free(c->QKV), free(c->DOUT);
    test_floats_free(c->qkv), test_floats_free(c->dout);
    test_floats_free(c->cosine), test_floats_free(c->sine);
}

/* Values and gradients of one sequence against the definition. */
static void attn_check_seq(attn_case *c, const float *out, int first, int count) {
    size_t wide = (size_t)attn_width(c), q = (size_t)(c->heads * c->hd);
    double *o = malloc((size_t)(count * c->hd) * sizeof *o);
    float *part = malloc((size_t)(count * c->hd) * sizeof *part);
    for (int h = 0; h < c->heads; h++) {
        attn_define(c, first, count, h, o);
        for (int r = 0; r < count; r++)
            memcpy(part + r * c->hd, out + (size_t)(first + r) * q + h * c->hd,
                   (size_t)c->hd * sizeof *part);
        check_near("o", part, o, (size_t)(count * c->hd));
    }
    free(o), free(part);
    c->first = first, c->count = count;
    check_grad("qkv", c->QKV + (size_t)first * wide, (size_t)count * wide,
               out + (size_t)c->rows * q + (size_t)first * wide, 0, count > 100 ? 12 : 40,
               attn_loss, c);
}

/* Every sequence of the batch by itself gives the same bits. */
static void attn_check_alone(const attn_case *c, const float *out) {
    rlhf_ctx *ctx = test_context("auto", 2);
    size_t wide = (size_t)attn_width(c), q = (size_t)(c->heads * c->hd);
    for (int s = 0, row = 0; s < c->seqs; row += c->len[s++]) {
        attn_case one = *c;
        size_t n = (size_t)c->len[s], at = (size_t)row;
        one.seqs = 1, one.rows = c->len[s], one.len = c->len + s;
        one.qkv += at * wide, one.dout += at * q, one.pos += row;
        float *alone = test_floats(n * (q + wide));
        attn_run(ctx, &one, alone);
        CHECK_BITS(alone, out + at * q, n * q);
        CHECK_BITS(alone + n * q, out + (size_t)c->rows * q + at * wide, n * wide);
        test_floats_free(alone);
    }
    rlhf_close(ctx);
}

/* All sequences side by side in steps of `step` tokens (the last ones shorter), with caches, which
 * are narrow where they can be. */
static void attn_check_steps(const attn_case *c, const float *out, int step) {
    rlhf_ctx *ctx = test_context("auto", 2);
    arena ws = {.ctx = ctx};
    op_env e = {ctx, &ws};
    size_t wide = (size_t)attn_width(c), q = (size_t)(c->heads * c->hd);
    size_t most = (size_t)(c->seqs * step);
    float *qkv = test_floats(most * wide), *o = test_floats(most * q);
    int32_t *pos = malloc(most * sizeof *pos);
    int *at = malloc((size_t)c->seqs * sizeof *at), *from = malloc((size_t)c->seqs * sizeof *from);
    op_seq *seq = malloc((size_t)c->seqs * sizeof *seq);
    op_kv *kv = malloc((size_t)c->seqs * sizeof *kv);
    for (int s = 0, row = 0; s < c->seqs; row += c->len[s++]) {
        kv[s] = kv_new(c, c->len[s] + 40, c->half && ctx->k->f32.narrow);
        at[s] = row;
    }
    for (int past = 0, live = 1; live; past += step) {
        op_attn a = attn_args(ctx, c);
        live = 0;
        for (int s = 0; s < c->seqs; s++) {
            int n = base_min(step, c->len[s] - past);
            if (n <= 0) continue;
            from[live] = at[s] + past;
            seq[live++] = (op_seq){.row = a.rows, .n = n, .past = past, .kv = kv[s]};
            for (int t = 0; t < n; t++) pos[a.rows + t] = past + t;
            memcpy(qkv + (size_t)a.rows * wide, c->qkv + (size_t)(at[s] + past) * wide,
                   (size_t)n * wide * sizeof *qkv);
            a.rows += n;
        }
        a.seqs = live, a.seq = seq, a.pos = pos, a.qkv = qkv, a.o = o;
        op_rope(&e, &a);
        op_attn_fwd(&e, &a);
        for (int s = 0; s < live; s++)
            CHECK_BITS(o + (size_t)seq[s].row * q, out + (size_t)from[s] * q, (size_t)seq[s].n * q);
    }
    for (int s = 0; s < c->seqs; s++) {
        size_t keys = op_kv_k_size(c->kv_heads, c->hd, kv[s].cap);
        size_t values = op_kv_v_size(c->kv_heads, c->hd, kv[s].cap);
        CHECK(test_margins(kv[s].k, op_kv_floats(kv[s].narrow, keys)));
        CHECK(test_margins(kv[s].v, op_kv_floats(kv[s].narrow, values)));
    }
    for (int s = 0; s < c->seqs; s++) test_floats_free(kv[s].k), test_floats_free(kv[s].v);
    free(pos), free(at), free(from), free(seq), free(kv);
    test_floats_free(qkv), test_floats_free(o);
    arena_free(&ws);
    rlhf_close(ctx);
}

static void attn_check_with(int heads, int kv_heads, int hd, int rope, int window, float cap) {
    static const int len[] = {1, 17, 64, 2, 130, 48, 65, 97, 49, 16, 128, 33, 3};
    int seqs = test_quick() ? 5 : (int)(sizeof len / sizeof *len);
    attn_case c = attn_new(heads, kv_heads, hd, rope != 0, len, seqs);
    if (rope > 1) c.rot = rope;
    c.window = window, c.cap = cap;
    size_t rows = (size_t)c.rows;
    float *out = run_everywhere(attn_run, &c, rows * (size_t)(heads * hd + attn_width(&c)));
    for (int s = 0, row = 0; s < seqs; row += len[s++])
        if (s < 4 || !test_quick()) attn_check_seq(&c, out, row, len[s]);
    attn_check_alone(&c, out);
    attn_check_steps(&c, out, 1);
    if (!test_quick()) {
        attn_check_steps(&c, out, 7);
        attn_check_steps(&c, out, 50);
        attn_check_steps(&c, out, 96);
    }
    test_floats_free(out);
    attn_free(&c);
}

static void attn_check(int heads, int kv_heads, int hd, int rope) {
    attn_check_with(heads, kv_heads, hd, rope, 0, 0);
}

/* What led sequences are whole: their past is copies of the rows that lead, from where no gradient
 * comes. */
static attn_case attn_whole(const attn_case *c, const int *len) {
    attn_case w = attn_new(c->heads, c->kv_heads, c->hd, c->rope, len, c->seqs);
    size_t wide = (size_t)attn_width(c), q = (size_t)(c->heads * c->hd);
    w.rot = c->rot, w.window = c->window, w.cap = c->cap;
    memset(w.dout, 0, (size_t)w.rows * q * sizeof *w.dout);
    for (int s = 0, row = 0, to = 0, lead = 0; s < c->seqs; row += c->len[s], to += len[s++]) {
        size_t past = (size_t)c->past[s], n = (size_t)c->len[s], at = (size_t)to;
        if (!past) lead = row;
        memcpy(w.qkv + at * wide, c->qkv + (size_t)lead * wide, past * wide * sizeof *w.qkv);
        at += past;
        memcpy(w.qkv + at * wide, c->qkv + (size_t)row * wide, n * wide * sizeof *w.qkv);
        memcpy(w.dout + at * q, c->dout + (size_t)row * q, n * q * sizeof *w.dout);
    }
    return w;
}

/* Sequences that are led by others: outputs, and gradients of their own rows, have the bits of
 * whole ones; gradients of rows that lead are sums. */
static void attn_check_led(int heads, int kv_heads, int hd, int rope, int window, float cap) {
    enum { N = 7 };
    static const int len[N] = {130, 33, 66, 1, 40, 17, 70}, past[N] = {0, 64, 129, 5, 0, 0, 16};
    int whole[N], longest = 195;
    attn_case c = attn_new(heads, kv_heads, hd, rope, len, N);
    for (int s = 0, row = 0; s < N; s++) {
        whole[s] = len[s] + past[s];
        for (int t = 0; t < len[s]; t++) c.pos[row++] = past[s] + t;
    }
    c.past = past, c.window = window, c.cap = cap;
    attn_case w = attn_whole(&c, whole);
    CHECK(whole[2] == longest);
    test_floats_free(c.cosine), test_floats_free(c.sine);
    size_t tables = (size_t)(longest * hd / 2);
    c.cosine = memcpy(test_floats(tables), w.cosine, tables * sizeof *c.cosine);
    c.sine = memcpy(test_floats(tables), w.sine, tables * sizeof *c.sine);
    size_t wide = (size_t)attn_width(&c), q = (size_t)(heads * hd);
    float *got = run_everywhere(attn_run, &c, (size_t)c.rows * (q + wide));
    float *all = run_everywhere(attn_run, &w, (size_t)w.rows * (q + wide));
    const float *d = got + (size_t)c.rows * q, *e = all + (size_t)w.rows * q;
    double *sum = calloc((size_t)c.rows * wide, sizeof *sum);
    for (int s = 0, row = 0, to = 0, lead = 0; s < N; row += len[s], to += whole[s++]) {
        size_t own = (size_t)(to + past[s]), n = (size_t)len[s];
        if (!past[s]) lead = row;
        CHECK_BITS(got + (size_t)row * q, all + own * q, n * q);
        if (past[s]) CHECK_BITS(d + (size_t)row * wide, e + own * wide, n * wide);
        for (size_t i = 0; i < (size_t)past[s] * wide; i++)
            sum[(size_t)lead * wide + i] += (double)e[(size_t)to * wide + i];
        for (size_t i = 0; i < n * wide; i++)
            sum[(size_t)row * wide + i] += (double)e[own * wide + i];
    }
    check_near("dqkv", d, sum, (size_t)c.rows * wide);
    free(sum);
    test_floats_free(got), test_floats_free(all);
    attn_free(&c), attn_free(&w);
}

TEST(attention_led) {
    attn_check_led(3, 3, 16, 0, 0, 0);
    attn_check_led(4, 2, 12, 1, 0, 0);
    attn_check_led(4, 2, 8, 1, 20, 0);
    attn_check_led(2, 1, 20, 1, 100, 1.5f);
}

TEST(attention) { attn_check(3, 3, 16, 0); }
TEST(attention_grouped) { attn_check(4, 2, 8, 1); }
TEST(attention_odd_width) { attn_check(2, 1, 20, 1); }
TEST(attention_wide) { attn_check(2, 2, 64, 1); }

/* Groups of heads that are too many for one tile, in steps of one query and of some. */
TEST(attention_many_heads) {
    static const int len[] = {70, 3, 130};
    attn_case c = attn_new(2 * OP_QUERIES + 10, 2, 4, 1, len, 3);
    size_t rows = (size_t)c.rows, width = (size_t)(c.heads * c.hd + attn_width(&c));
    float *out = run_everywhere(attn_run, &c, rows * width);
    attn_check_steps(&c, out, 1);
    attn_check_steps(&c, out, 7);
    test_floats_free(out);
    attn_free(&c);
}

/* A part of a head is rotated; windows shorter and longer than a tile of keys; soft caps. */
TEST(attention_part_rotated) { attn_check(2, 1, 12, 4); }
TEST(attention_window) {
    attn_check_with(2, 1, 8, 1, 1, 0);
    attn_check_with(2, 1, 8, 1, 20, 0);
    attn_check_with(2, 2, 8, 0, 64, 0);
    attn_check_with(2, 1, 8, 1, 100, 0);
}
TEST(attention_capped) {
    attn_check_with(2, 1, 8, 1, 0, 1.5f);
    attn_check_with(4, 2, 12, 4, 33, 2.5f);
}

/* Keys and values that are rounded are as if they had been so before, gradients pass; caches of
 * sixteen bits change nothing. */
TEST(attention_of_bfloat16) {
    static const int len[] = {130, 1, 17, 64, 33};
    for (int rope = 0; rope < 2; rope++) {
        attn_case c = attn_new(6, 2, 20, rope, len, 5);
        size_t n = (size_t)c.rows * (size_t)(c.heads * c.hd + attn_width(&c));
        c.half = 1;
        float *out = run_everywhere(attn_run, &c, n);
        for (int step = 1; step < 70; step += 17) attn_check_steps(&c, out, step);
        size_t o = (size_t)c.rows * (size_t)(c.heads * c.hd), finer = 0;
        for (size_t i = o; i < n; i++) finer += out[i] != v_wide1(v_half1(out[i]));
        CHECK(finer > (n - o) / 10 * 9); /* gradients are not rounded */
        if (!rope) {
            for (int r = 0; r < c.rows; r++)
                for (int j = c.heads * c.hd; j < attn_width(&c); j++) {
                    float *x = c.qkv + r * attn_width(&c) + j;
                    *x = v_wide1(v_half1(*x));
                }
            c.half = 0;
            float *twin = run_everywhere(attn_run, &c, n);
            CHECK_BITS(out, twin, n);
            test_floats_free(twin);
        }
        test_floats_free(out);
        attn_free(&c);
    }
}

/* Scores far apart: a new maximum in a later tile wipes out what came before, or nothing does. */
TEST(attention_extremes) {
    static const int len[] = {130, 70};
    attn_case c = attn_new(2, 1, 8, 0, len, 2);
    size_t wide = (size_t)attn_width(&c);
    for (int r = 0; r < c.rows; r++)
        for (int j = 0; j < 24; j++)
            c.qkv[(size_t)r * wide + (size_t)j] *= j < 16 ? 10.0f : r % 50 == 30 ? 30.0f : 3.0f;
    free(c.QKV);
    c.QKV = doubles(c.qkv, (size_t)c.rows * wide);
    float *out = run_everywhere(attn_run, &c, (size_t)c.rows * (16 + wide));
    double *o = malloc(130 * 8 * sizeof *o);
    for (int h = 0; h < 2; h++) {
        attn_define(&c, 0, 130, h, o);
        for (int i = 0; i < 130 * 8; i++) CHECK_NEAR(out[i / 8 * 16 + h * 8 + i % 8], o[i], 2e-4);
    }
    attn_check_alone(&c, out);
    attn_check_steps(&c, out, 1);
    free(o);
    test_floats_free(out);
    attn_free(&c);
}

/* ---- vocabulary ------------------------------------------------------------------------------ */

typedef struct vocab_case {
    int rows, n, d;
    float scale, cap;
    float *x, *w, *x2, *w2;
    int32_t *target;
    double *X, *W;
    int first, count; /* rows that vocab_loss computes */
} vocab_case;

/* The loss is sum_r a_r e^logp + b_r logp, so the coefficients need what the forward pass found. */
static double vocab_a(int row) { return row % 3 == 0 ? 0 : 1.5; }
static double vocab_b(int row) { return row % 5 == 4 ? -0.5 : 0.25; }

static void vocab_coef(void *user, int row, int n, const op_rows *found, float *coef) {
    int *next = user;
    CHECK_EQ_I(row, *next); /* in order, without gaps */
    *next = row + n;
    for (int r = 0; r < n; r++)
        coef[r] = (float)(vocab_a(row + r) * exp((double)found->logp[r]) + vocab_b(row + r));
}

static op_weight vocab_weight(rlhf_ctx *ctx, const vocab_case *c, const float *w, float *packed,
                              float *gw) {
    gemm_pack_args g = {.s = {.w = w, .ks = 1, .ns = (size_t)c->d}, .k = c->d, .n = c->n,
                        .out = packed};
    gemm_pack(ctx, &g);
    return (op_weight){.n = c->n, .k = c->d, .cap = c->cap, .w = w, .packed = packed, .gw = gw};
}

/* out: logp, entropy, hit; dx, gw; then compare: logp, kl, other_logp */
static void vocab_run(rlhf_ctx *ctx, const void *data, float *out) {
    const vocab_case *c = data;
    size_t n = (size_t)c->rows, d = (size_t)c->d, packed = gemm_packed_size(ctx->k, 0, c->d, c->n);
    float *dx = out + 3 * n, *gw = fill(dx + n * d, (size_t)c->n * d, BASE);
    float *more = gw + (size_t)c->n * d, *p = test_floats(packed), *p2 = test_floats(packed);
    uint8_t *hit = malloc(n);
    arena ws = {.ctx = ctx};
    op_env e = {ctx, &ws};
    op_weight w = vocab_weight(ctx, c, c->w, p, gw), w2 = vocab_weight(ctx, c, c->w2, p2, NULL);
    op_rows rows = {out, out + n, hit}, only = {more, NULL, NULL};
    int next = 0;
    op_vocab_run(&e, &w, c->rows, c->x, c->target, c->scale, &rows, vocab_coef, &next, dx);
    CHECK_EQ_I(next, c->rows);
    for (size_t r = 0; r < n; r++) out[2 * n + r] = hit[r];
    op_vocab_compare(&e, &w, c->x, &w2, c->x2, c->rows, c->target, c->scale, &only, more + n,
                     more + 2 * n);
    CHECK_BITS(more, out, n);
    op_vocab_run(&e, &w, c->rows, c->x, c->target, c->scale, &only, NULL, NULL, NULL);
    CHECK_BITS(more, out, n);
    arena_free(&ws);
    free(hit);
    test_floats_free(p), test_floats_free(p2);
}

/* All log-probabilities of one row. */
static void vocab_define(const vocab_case *c, const double *x, const double *w, double *logp) {
    double max = -1e300, sum = 0;
    for (int v = 0; v < c->n; v++) {
        logp[v] = 0;
        for (int j = 0; j < c->d; j++) logp[v] += x[j] * w[v * c->d + j];
        if (c->cap > 0) logp[v] = (double)c->cap * tanh(logp[v] / (double)c->cap);
        logp[v] *= (double)c->scale;
        max = fmax(max, logp[v]);
    }
    for (int v = 0; v < c->n; v++) sum += exp(logp[v] - max);
    for (int v = 0; v < c->n; v++) logp[v] -= max + log(sum);
}

static double vocab_loss(const void *arg) {
    const vocab_case *c = arg;
    double sum = 0, *logp = malloc((size_t)c->n * sizeof *logp);
    for (int r = c->first; r < c->first + c->count; r++) {
        vocab_define(c, c->X + r * c->d, c->W, logp);
        sum += vocab_a(r) * exp(logp[c->target[r]]) + vocab_b(r) * logp[c->target[r]];
    }
    free(logp);
    return sum;
}

static vocab_case vocab_new(int rows, int n, int d, float scale) {
    size_t x = (size_t)(rows * d), w = (size_t)(n * d);
    vocab_case c = {.rows = rows, .n = n, .d = d, .scale = scale};
    c.x = floats(x, -1, 1), c.x2 = floats(x, -1, 1);
    c.w = floats(w, -2, 2), c.w2 = floats(w, -2, 2);
    c.target = malloc((size_t)rows * sizeof *c.target);
    for (int r = 0; r < rows; r++) c.target[r] = (int32_t)test_int(0, n - 1);
    c.X = doubles(c.x, x), c.W = doubles(c.w, w);
    return c;
}

static void vocab_free(vocab_case *c) {
    free(c->target), free(c->X), free(c->W);
    test_floats_free(c->x), test_floats_free(c->x2);
    test_floats_free(c->w), test_floats_free(c->w2);
}

/* What is found of each row. */
static void vocab_check_rows(const vocab_case *c, const float *out) {
    size_t n = (size_t)c->rows, d = (size_t)c->d;
    const float *more = out + 3 * n + n * d + (size_t)c->n * d;
    double *X2 = doubles(c->x2, n * d), *W2 = doubles(c->w2, (size_t)c->n * d);
    double *p = malloc((size_t)c->n * sizeof *p), *q = malloc((size_t)c->n * sizeof *q);
    for (int r = 0; r < c->rows; r += c->rows > 100 ? 11 : 1) {
        double entropy = 0, kl = 0, top = -1e300;
        vocab_define(c, c->X + r * c->d, c->W, p);
        vocab_define(c, X2 + r * c->d, W2, q);
        for (int v = 0; v < c->n; v++) {
            entropy -= exp(p[v]) * p[v];
            kl += exp(p[v]) * (p[v] - q[v]);
            top = fmax(top, p[v]);
        }
        CHECK_NEAR(out[r], p[c->target[r]], 1e-5);
        CHECK_NEAR(out[n + (size_t)r], entropy, 1e-5);
        CHECK_EQ_I(out[2 * n + (size_t)r], p[c->target[r]] > top - 1e-9);
        CHECK_NEAR(more[n + (size_t)r], kl, 2e-5);
        CHECK_NEAR(more[2 * n + (size_t)r], q[c->target[r]], 1e-5);
    }
    free(X2), free(W2), free(p), free(q);
}

static void vocab_check_with(int rows, int n, int d, float scale, float cap) {
    vocab_case c = vocab_new(rows, n, d, scale);
    c.cap = cap;
    size_t m = (size_t)rows, x = m * (size_t)d, w = (size_t)(n * d);
    float *out = run_everywhere(vocab_run, &c, 3 * m + x + w + 3 * m);
    vocab_check_rows(&c, out);
    for (int r = 0; r < rows; r += rows / 4 + 1) {
        c.first = r, c.count = 1;
        check_grad("x", c.X + r * d, (size_t)d, out + 3 * m + r * d, 0, 10, vocab_loss, &c);
    }
    c.first = 0, c.count = rows;
    check_grad("weight", c.W, w, out + 3 * m + x, BASE, rows > 100 ? 12 : 40, vocab_loss, &c);
    test_floats_free(out);
    vocab_free(&c);
}

static void vocab_check(int rows, int n, int d, float scale) {
    vocab_check_with(rows, n, d, scale, 0);
}

TEST(vocabulary) {
    vocab_check(1, 1, 1, 1);
    vocab_check(7, 5, 3, 1);
    vocab_check(30, 50, 16, 0.7f);
    vocab_check(26, 100, 9, 1.0f / 0.3f);
}

/* A soft cap, also on rows longer than the pieces that its gradient goes by. */
TEST(vocabulary_capped) {
    vocab_check_with(7, 5, 3, 1, 1);
    vocab_check_with(30, 50, 16, 0.7f, 2.5f);
    vocab_check_with(60, 1100, 6, 1, 2);
}

/* More rows than a chunk holds. */
TEST(vocabulary_chunks) {
    CHECK_EQ_I(op_vocab_chunk(130, 64, 600, 1), 304);
    vocab_check(test_quick() ? 520 : 1100, 130, 12, 1.25f);
    CHECK_EQ_I(op_vocab_chunk(200000, 64, 1000, 1), 80);
    CHECK_EQ_I(op_vocab_chunk(200000, 480, 1000, 1), 112);  /* d / 4 */
    CHECK_EQ_I(op_vocab_chunk(200000, 1600, 1000, 1), 168); /* 128 MiB */
    CHECK(op_vocab_chunk(1 << 24, 64, 100, 1) == 24 && op_vocab_chunk(1, 64, 512, 1) == 512);
    CHECK(op_vocab_chunk(130, 64, 600, 2) == 200 && op_vocab_chunk(1 << 24, 64, 100, 2) == 24);
    CHECK(op_vocab_chunk(100, 64, 1, 1) == 8 && op_vocab_chunk(100, 64, 0, 1) == 1);
}

/* The parts of a batch give what the batch gives; gradients of weights continue each other. The
 * coefficients repeat after 15 rows, so that a part may begin at any multiple. */
TEST(vocabulary_in_parts) {
    vocab_case c = vocab_new(60, 70, 20, 1);
    size_t m = 60, x = m * 20, w = 70 * 20;
    rlhf_ctx *ctx = test_context("auto", 2);
    arena ws = {.ctx = ctx};
    op_env e = {ctx, &ws};
    float *whole = test_floats(m + x + w), *part = test_floats(m + x + w);
    float *p = test_floats(gemm_packed_size(ctx->k, 0, 20, 70));
    for (int cut = 60; cut > 0; cut -= 15) {
        float *out = cut == 60 ? whole : part;
        op_weight weight = vocab_weight(ctx, &c, c.w, p, fill(out + m + x, w, BASE));
        for (int r = 0; r < 60; r += cut) {
            op_rows rows = {out + r, NULL, NULL};
            int next = 0;
            op_vocab_run(&e, &weight, base_min(cut, 60 - r), c.x + r * 20, c.target + r, 1, &rows,
                         vocab_coef, &next, out + m + r * 20);
        }
        CHECK_BITS(out, whole, m + x + w);
    }
    arena_free(&ws);
    test_floats_free(whole), test_floats_free(part), test_floats_free(p);
    rlhf_close(ctx);
    vocab_free(&c);
}

TEST_MAIN(CASE(layer_norm), CASE(rms_norm), CASE(linear), CASE(linear_narrow),
          CASE(embedding), CASE(embedding_of_few_tokens), CASE(gelu), CASE(gelu_exact), CASE(glu),
          CASE(geglu),
          CASE(attention), CASE(attention_led), CASE(attention_grouped), CASE(attention_odd_width),
          CASE(attention_wide), CASE(attention_many_heads), CASE(attention_part_rotated),
          CASE(attention_window), CASE(attention_capped), CASE(attention_of_bfloat16),
          CASE(attention_extremes),
          CASE(vocabulary), CASE(vocabulary_capped), CASE(vocabulary_chunks),
          CASE(vocabulary_in_parts))
