/* The matrix product. What it computes is defined here a second time, as one chain of
 * fused multiply-adds for each output, and every table of kernels has to give those bits, in any
 * shape, with any number of threads, however the rows and the sum are cut into calls. */

#include "../rlhf.c"
#include "test.h"

enum { ADD = 2 }; /* the sum is added to C: gemm_tile_args.add is C itself */

/* One product. Leading dimensions exceed the rows, and what lies between is poison. */
typedef struct prod {
    int m, n, k, mode; /* GEMM_STORE, GEMM_ACC or ADD */
    bool ta, tb; /* A is stored as [k][m], B as [n][k] */
    bool bias, act, half; /* half: of numbers rounded to bfloat16 */
    bool narrow, ieee; /* B's numbers are bfloat16, or of IEEE's half precision, exactly */
    size_t lda, ldb, ldc, ldy;
    float *a, *b, *c, *y, *v; /* v: the bias */
    float *want, *wanty;
} prod;

static float *matrix(int rows, int cols, size_t ld) {
    float *x = test_floats((size_t)rows * ld);
    for (int r = 0; r < rows; r++) test_fill(x + (size_t)r * ld, (size_t)cols, -1, 1);
    return x;
}

/* Sixteen bits of a number that is one of p's kind, and back. */
static uint16_t prod_short(const prod *p, float x) {
    return p->ieee ? ckpt_to_half(x) : v_half1(x);
}
static float prod_long(const prod *p, uint16_t h) { return p->ieee ? v_ieee1(h) : v_wide1(h); }

static float prod_a(const prod *p, int i, int k) {
    float x = p->ta ? p->a[(size_t)k * p->lda + (size_t)i] : p->a[(size_t)i * p->lda + (size_t)k];
    return p->half ? v_wide1(v_half1(x)) : x;
}

static float prod_b(const prod *p, int k, int j) {
    float x = p->tb ? p->b[(size_t)j * p->ldb + (size_t)k] : p->b[(size_t)k * p->ldb + (size_t)j];
    return p->half ? v_wide1(v_half1(x)) : x;
}

/* The output by definition. */
static float prod_chain(const prod *p, int i, int j) {
    float old = p->c[(size_t)i * p->ldc + (size_t)j], sum = p->mode == GEMM_ACC ? old : 0;
    for (int k = 0; k < p->k; k++) sum = fmaf(prod_a(p, i, k), prod_b(p, k, j), sum);
    if (p->bias) sum += p->v[j];
    return p->mode == ADD ? old + sum : sum;
}

/* The same in double precision; *size becomes the sum of the terms' magnitudes. */
static double prod_exact(const prod *p, int i, int j, double *size) {
    double old = p->mode == GEMM_STORE ? 0 : (double)p->c[(size_t)i * p->ldc + (size_t)j];
    double v = p->bias ? (double)p->v[j] : 0, sum = old + v;
    *size = fabs(old) + fabs(v);
    for (int k = 0; k < p->k; k++) {
        double t = (double)prod_a(p, i, k) * (double)prod_b(p, k, j);
        sum += t;
        *size += fabs(t);
    }
    return sum;
}

/* Draws the operands and computes what is to come out. */
static prod prod_new(int m, int n, int k, int mode, unsigned flags) {
    prod p = {.m = m, .n = n, .k = k, .mode = mode, .ta = flags & 1, .tb = flags & 2,
              .bias = flags & 4, .act = flags & 8, .half = flags & 16,
              .narrow = flags & 32, .ieee = flags & 64};
    p.lda = (size_t)(p.ta ? m : k) + 3;
    p.ldb = (size_t)(p.tb ? k : n) + 2;
    p.ldc = (size_t)n + 5;
    p.ldy = (size_t)n + 1;
    p.a = p.ta ? matrix(k, m, p.lda) : matrix(m, k, p.lda);
    p.b = p.tb ? matrix(n, k, p.ldb) : matrix(k, n, p.ldb);
    for (int i = 0; (p.narrow || p.ieee) && i < (p.tb ? n : k); i++)
        for (int j = 0; j < (p.tb ? k : n); j++) {
            float *x = p.b + (size_t)i * p.ldb + (size_t)j;
            *x = prod_long(&p, (i + j) % 19 ? prod_short(&p, *x) : (uint16_t)(i % 128));
            /* some are denormal */
        }
    p.c = matrix(m, n, p.ldc);
    p.y = test_floats((size_t)m * p.ldy);
    p.v = matrix(1, n, (size_t)n);
    p.want = test_floats((size_t)m * p.ldc);
    p.wanty = test_floats((size_t)m * p.ldy);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            float w = prod_chain(&p, i, j);
            double size, exact = prod_exact(&p, i, j, &size);
            CHECK_NEAR(w, exact, 0x1p-24 * (k + 2) * size);
            p.want[(size_t)i * p.ldc + (size_t)j] = w;
        }
    for (int i = 0; p.act && i < m; i++)
        k_r_gelu(n, p.want + (size_t)i * p.ldc, p.wanty + (size_t)i * p.ldy);
    return p;
}

static void prod_free(prod *p) {
    float *all[] = {p->a, p->b, p->c, p->y, p->v, p->want, p->wanty};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) test_floats_free(all[i]);
}

/* B as it lies; turned: its transpose. */
static gemm_source prod_source(const prod *p, bool turned) {
    gemm_source s = {.w = p->b, .ks = p->ldb, .ns = 1};
    if (p->tb != turned) s.ks = 1, s.ns = p->ldb;
    return s;
}

static float *prod_pack_as(rlhf_ctx *ctx, const prod *p, bool turned) {
    int k = turned ? p->n : p->k, n = turned ? p->k : p->n;
    size_t size = gemm_packed_size(ctx->k, p->half, k, n);
    float *packed = test_floats(size);
    gemm_pack_args g = {.s = prod_source(p, turned), .k = k, .n = n, .half = p->half,
                        .out = packed};
    gemm_pack(ctx, &g);
    CHECK(test_margins(packed, size));
    return packed;
}

static float *prod_pack(rlhf_ctx *ctx, const prod *p) { return prod_pack_as(ctx, p, false); }

static gemm_args prod_args(rlhf_ctx *ctx, const prod *p, const float *packed, float *c, float *y) {
    gemm_args g = {.m = p->m, .n = p->n, .half = p->half};
    g.t = (gemm_tile_args){.k = p->k, .a = p->a, .rs = p->ta ? 1 : p->lda,
                           .cs = p->ta ? p->lda : 1, .b = packed,
                           .bs = gemm_panel_size(ctx->k, p->half, p->k), .c = c, .ldc = p->ldc,
                           .mode = p->mode == GEMM_ACC, .bias = p->bias ? p->v : NULL,
                           .add = p->mode == ADD ? c : NULL};
    g.src = prod_source(p, false);
    if (p->act) {
        g.act = ctx->k->gelu;
        g.y = y;
        g.ldy = p->ldy;
    }
    return g;
}

static void run(rlhf_ctx *ctx, const gemm_args *g) {
    arena ws = {.ctx = ctx};
    gemm_run(ctx, &ws, g);
    arena_free(&ws);
}

/* Where B may lie: in rows, packed before, in panels, in panels of its transpose; the last two and
 * rows once more with sixteen bits a number. */
static const char *const forms[] = {"",           "packed",      "panels",        "turned",
                                    "short rows", "short panels", "turned shorts"};
enum { FORMS = sizeof forms / sizeof *forms };

/* B in such a form; *mem becomes memory behind it, or null. false: there is none. */
static bool prod_form(rlhf_ctx *ctx, const prod *p, int form, gemm_args *g, float **mem) {
    bool shorts = form > 3, turned = form == 3 || form == 6;
    size_t n = shorts && form == 4 ? (size_t)(p->tb ? p->n : p->k) * p->ldb : 0;
    *mem = NULL;
    if (form == 0) return true;
    /* Products of bfloat16 have panels of pairs. */
    if (shorts && ((!p->narrow && !p->ieee) || (p->half && form > 4))) return false;
    float *from = form == 4 ? p->b : prod_pack_as(ctx, p, turned);
    int steps = (int)gemm_panel_size(ctx->k, p->half, turned ? p->n : p->k) / RLHF_LANES;
    if (form == 1) g->t.b = from;
    else if (form != 4) {
        size_t line = p->half ? RLHF_LANES / 2 : RLHF_LANES, next = (size_t)steps;
        g->src = (gemm_source){.w = from, .layout = turned ? GEMM_TURNED : GEMM_PANELS,
                               .ks = turned ? next : line, .ns = turned ? line : next};
    }
    *mem = from;
    if (!shorts) return true;
    if (form != 4) n = gemm_packed_size(ctx->k, 0, turned ? p->n : p->k, turned ? p->k : p->n);
    *mem = test_floats((n + 1) / 2);
    uint16_t *bits = (uint16_t *)(void *)*mem;
    for (size_t i = 0; i < n; i++) bits[i] = prod_short(p, from[i]);
    g->src.w = NULL, g->src.narrow = bits, g->src.ieee = p->ieee;
    if (form != 4) test_floats_free(from);
    return true;
}

/* Runs it in ctx and compares: the outputs, what lies between their rows, and around them. */
static void prod_check(rlhf_ctx *ctx, const prod *p) {
    size_t nc = (size_t)p->m * p->ldc, ny = (size_t)p->m * p->ldy;
    float *c = test_floats(nc), *y = test_floats(ny), *mem;
    for (int form = 0; form < FORMS; form++) {
        memcpy(c, p->c, nc * sizeof *c);
        gemm_args g = prod_args(ctx, p, NULL, c, y);
        if (!prod_form(ctx, p, form, &g, &mem)) continue;
        int before = test_failures;
        run(ctx, &g);
        CHECK_BITS(c, p->want, nc);
        CHECK_BITS(y, p->wanty, ny);
        CHECK(test_margins(c, nc) && test_margins(y, ny));
        if (test_failures > before)
            test_fail(__FILE__, __LINE__,
                      "above: %s, %d threads, m %d n %d k %d, mode %d, %s%s%s%s%s", ctx->k->name,
                      ctx->threads, p->m, p->n, p->k, p->mode, p->ta ? "A' " : "",
                      p->tb ? "B' " : "", p->bias ? "bias " : "", p->act ? "gelu " : "",
                      forms[form]);
        test_floats_free(mem);
    }
    test_floats_free(c);
    test_floats_free(y);
}

typedef struct contexts {
    int n;
    rlhf_ctx *ctx[K_TABLES];
} contexts;

static contexts open_all(int threads) {
    contexts c = {0};
    for (int i = 0; i < K_TABLES; i++)
        if (k_tables[i]->available()) c.ctx[c.n++] = test_context(k_tables[i]->name, threads);
    return c;
}

static void close_all(contexts *c) {
    for (int i = 0; i < c->n; i++) rlhf_close(c->ctx[i]);
}

/* ---- packing --------------------------------------------------------------------------------- */

TEST(pack_layout) {
    rlhf_ctx *ctx = test_context("auto", 2);
    for (int n = 1; n <= 70; n += n < 40 ? 1 : 15)
        for (int k = 1; k <= 200; k += k < 20 ? 3 : 61)
            for (unsigned tb = 0; tb < 4; tb += 2) {
                prod p = prod_new(1, n, k, GEMM_STORE, tb);
                float *packed = prod_pack(ctx, &p), want[RLHF_LANES];
                for (int q = 0; q < (int)gemm_panels(n); q++)
                    for (int r = 0; r < k; r++) {
                        for (int l = 0; l < RLHF_LANES; l++) {
                            int j = q * RLHF_LANES + l;
                            want[l] = j < n ? prod_b(&p, r, j) : 0;
                        }
                        CHECK_BITS(packed + ((size_t)q * (size_t)k + (size_t)r) * RLHF_LANES, want,
                                   RLHF_LANES);
                    }
                test_floats_free(packed);
                prod_free(&p);
            }
    rlhf_close(ctx);
}

/* ---- shapes ---------------------------------------------------------------------------------- */

/* Every height and width up to 40, over modes, transposes, bias and activation in turn. */
static void sweep(const int *ks, int n_ks, int step) {
    contexts c = open_all(1);
    unsigned turn = 0;
    for (int m = 1; m <= 40; m += step)
        for (int n = 1; n <= 40; n += step)
            for (int i = 0; i < n_ks; i++, turn++) {
                prod p = prod_new(m, n, ks[i], (int)(turn % 3), turn / 3 % 16);
                for (int t = 0; t < c.n; t++) prod_check(c.ctx[t], &p);
                prod_free(&p);
            }
    close_all(&c);
}

TEST(every_m_and_n) {
    static const int ks[] = {1, 2, 7, 16, 33};
    sweep(ks, test_quick() ? 2 : 5, test_quick() ? 3 : 1);
}

TEST(every_k) {
    contexts c = open_all(1);
    for (int k = 0; k <= 40; k++)
        for (int mode = 0; mode < 3; mode++)
            for (unsigned flags = 0; flags < 16; flags++) {
                prod p = prod_new(1 + (k * 5 + (int)flags) % 14, 1 + (k * 11 + mode) % 50, k, mode,
                                  flags | (k % 2 ? 32 : 64));
                for (int t = 0; t < c.n; t++) prod_check(c.ctx[t], &p);
                prod_free(&p);
            }
    close_all(&c);
}

/* Widths at which every tile has its turn: whole ones, a rest of single panels, an edge. */
TEST(every_tile) {
    static const int ns[] = {16, 32, 48, 64, 80, 96, 97, 111, 112, 160, 192, 207};
    contexts c = open_all(1);
    for (int m = 1; m <= 40; m += test_quick() ? 3 : 1)
        for (size_t i = 0; i < sizeof ns / sizeof *ns; i++) {
            prod p = prod_new(m, ns[i], 9, (m + (int)i) % 3,
                              (unsigned)(m * 7 + (int)i) % 16 | 32);
            for (int t = 0; t < c.n; t++) prod_check(c.ctx[t], &p);
            prod_free(&p);
        }
    close_all(&c);
}

/* Blocks of rows, several columns of blocks, and threads that share them unevenly. */
TEST(large_with_threads) {
    static const struct { int m, n, k; } shapes[] = {{1, 1000, 70},  {97, 33, 65},   {193, 50, 40},
                                                     {200, 17, 130}, {13, 700, 31},  {5, 260, 300},
                                                     {96, 96, 96},   {300, 300, 20}};
    static const int threads[] = {1, 2, 3, 5};
    int count = test_quick() ? 4 : (int)(sizeof shapes / sizeof *shapes);
    for (int i = 0; i < count; i++)
        for (int mode = 0; mode < 3; mode++) {
            prod p = prod_new(shapes[i].m, shapes[i].n, shapes[i].k, mode,
                              (unsigned)(i * 5 + mode * 3) % 16 | 32);
            for (int t = 0; t < 4; t++) {
                contexts c = open_all(threads[t]);
                for (int j = 0; j < c.n; j++) prod_check(c.ctx[j], &p);
                close_all(&c);
            }
            prod_free(&p);
        }
}

/* ---- invariance ------------------------------------------------------------------------------ */

/* Any part of the rows gives the rows of the whole. */
TEST(row_alone) {
    contexts c = open_all(2);
    prod p = prod_new(31, 75, 90, ADD, 12);
    for (int t = 0; t < c.n; t++)
        for (int height = 1; height <= 31; height += height < 14 ? 1 : 6)
            for (int m = 0; m + height <= p.m; m += height) {
                prod part = p;
                part.m = height;
                part.a += (size_t)m * p.lda;
                float *c0 = test_floats((size_t)height * p.ldc);
                float *y0 = test_floats((size_t)height * p.ldy);
                memcpy(c0, p.c + (size_t)m * p.ldc, (size_t)height * p.ldc * sizeof *c0);
                float *packed = prod_pack(c.ctx[t], &part);
                gemm_args g = prod_args(c.ctx[t], &part, packed, c0, y0);
                run(c.ctx[t], &g);
                CHECK_BITS(c0, p.want + (size_t)m * p.ldc, (size_t)height * p.ldc);
                CHECK_BITS(y0, p.wanty + (size_t)m * p.ldy, (size_t)height * p.ldy);
                test_floats_free(packed);
                test_floats_free(c0);
                test_floats_free(y0);
            }
    prod_free(&p);
    close_all(&c);
}

/* GEMM_ACC continues the chain: the sum may be cut anywhere. */
TEST(sum_in_parts) {
    contexts c = open_all(3);
    prod p = prod_new(29, 83, 60, GEMM_ACC, 0);
    size_t nc = (size_t)p.m * p.ldc;
    for (int t = 0; t < c.n; t++)
        for (int step = 1; step <= p.k; step += step < 10 ? 3 : 17) {
            float *out = test_floats(nc);
            memcpy(out, p.c, nc * sizeof *out);
            for (int k = 0; k < p.k; k += step) {
                prod part = p;
                part.k = base_min(step, p.k - k);
                part.a += k;
                part.b += (size_t)k * p.ldb;
                float *packed = prod_pack(c.ctx[t], &part);
                gemm_args g = prod_args(c.ctx[t], &part, packed, out, NULL);
                run(c.ctx[t], &g);
                test_floats_free(packed);
            }
            CHECK_BITS(out, p.want, nc);
            test_floats_free(out);
        }
    prod_free(&p);
    close_all(&c);
}

/* Panels may lie in a longer buffer, and a part of the product is computed alone: as attention
 * does. */
TEST(block_of_panels) {
    contexts c = open_all(1);
    prod p = prod_new(14, 107, 21, GEMM_STORE, 4);
    size_t nc = (size_t)p.m * p.ldc, panel = (size_t)p.k * RLHF_LANES, bs = panel + 11;
    int panels = (int)gemm_panels(p.n);
    for (int t = 0; t < c.n; t++) {
        float *packed = prod_pack(c.ctx[t], &p), *wide = test_floats((size_t)panels * bs);
        for (int q = 0; q < panels; q++)
            memcpy(wide + (size_t)q * bs, packed + (size_t)q * panel, panel * sizeof *wide);
        for (int p0 = 0; p0 < panels; p0++)
            for (int p1 = p0 + 1; p1 <= panels; p1++) {
                float *out = test_floats(nc), *want = test_floats(nc);
                gemm_args g = prod_args(c.ctx[t], &p, wide, out, NULL);
                g.t.bs = bs;
                gemm_args part = gemm_part(&g, 2, 13, p0, p1);
                gemm_block(c.ctx[t]->k, &part);
                int n0 = p0 * RLHF_LANES, n1 = base_min(p1 * RLHF_LANES, p.n);
                for (size_t r = 2; r < 13; r++)
                    memcpy(want + r * p.ldc + n0, p.want + r * p.ldc + n0,
                           (size_t)(n1 - n0) * sizeof *want);
                CHECK_BITS(out, want, nc);
                test_floats_free(out);
                test_floats_free(want);
            }
        test_floats_free(packed);
        test_floats_free(wide);
    }
    prod_free(&p);
    close_all(&c);
}

/* Sums longer than GEMM_DEPTH are cut, with C or scratch between the parts; blocks of rows follow
 * the cache. */
TEST(long_sums) {
    static const struct { int m, n, k; } shapes[] = {
        {20, 35, 2 * GEMM_DEPTH + 33}, {9, 50, 2 * GEMM_DEPTH}, {100, 35, 3 * GEMM_DEPTH + 1},
        {33, 70, 2 * GEMM_DEPTH + 17}};
    for (int i = 0; i < (test_quick() ? 1 : 4); i++)
        for (int mode = 0; mode < 3; mode++)
            for (unsigned flags = 0; flags < 16; flags += 5) {
                prod p = prod_new(shapes[i].m, shapes[i].n, shapes[i].k, mode,
                                  flags | (mode ? 32 : 64));
                for (int threads = 1; threads <= 3; threads += 2) {
                    contexts c = open_all(threads);
                    for (int t = 0; t < c.n; t++) {
                        c.ctx[t]->cache = threads == 1 ? 1 << 20 : 1 << 15;
                        prod_check(c.ctx[t], &p);
                    }
                    close_all(&c);
                }
                prod_free(&p);
            }
}

/* ---- bfloat16 -------------------------------------------------------------------------------- */

/* Whether the table's pairs are two steps of the chain, hence the bits of the definition. */
static bool emulates(const k_table *k) {
    return !k->bf16.peak;
}

/* Every table against the definition: to the bit where pairs are emulated, else to the rounding of
 * sums in single precision; and against itself, bit for bit, with other threads, and rows alone. */
static void half_check(contexts *c, contexts *more, const prod *p) {
    size_t nc = (size_t)p->m * p->ldc, ny = (size_t)p->m * p->ldy;
    for (int t = 0; t < c->n; t++) {
        float *packed = prod_pack(c->ctx[t], p), *y = test_floats(ny), *first = NULL;
        if (emulates(c->ctx[t]->k)) prod_check(c->ctx[t], p);
        for (int way = 0; way < 4; way++) {
            float *out = test_floats(nc);
            memcpy(out, p->c, nc * sizeof *out);
            rlhf_ctx *ctx = way & 1 ? more->ctx[t] : c->ctx[t];
            gemm_args g = prod_args(ctx, p, way & 2 ? packed : NULL, out, y);
            run(ctx, &g);
            CHECK(test_margins(out, nc));
            for (int i = 0; i < p->m && way == 0; i++)
                for (int j = 0; j < p->n; j++) {
                    double size, exact = prod_exact(p, i, j, &size);
                    CHECK_NEAR(out[(size_t)i * p->ldc + (size_t)j], exact,
                               0x1p-23 * (p->k + 3) * size + 1e-30);
                }
            if (first) CHECK_BITS(out, first, nc);
            if (first) test_floats_free(out);
            else first = out;
        }
        /* One row alone. */
        gemm_args g = prod_args(c->ctx[t], p, packed, y, y);
        float *row = test_floats(p->ldc);
        memcpy(row, p->c + (size_t)(p->m / 2) * p->ldc, p->ldc * sizeof *row);
        gemm_args one = gemm_part(&g, p->m / 2, p->m / 2 + 1, 0, (int)gemm_panels(p->n));
        one.t.c = row;
        if (one.t.add) one.t.add = row;
        one.act = NULL;
        run(c->ctx[t], &one);
        CHECK_BITS(row, first + (size_t)(p->m / 2) * p->ldc, p->n);
        test_floats_free(row);
        test_floats_free(first);
        test_floats_free(packed);
        test_floats_free(y);
    }
}

TEST(half_products) {
    static const struct { int m, n, k; } shapes[] = {
        {1, 16, 32},   {1, 50, 33},  {3, 7, 1},     {5, 33, 64},   {16, 32, 31}, {17, 48, 96},
        {31, 20, 257}, {32, 32, 32}, {33, 100, 65}, {70, 65, 300}, {97, 130, 70}, {20, 300, 513}};
    contexts c = open_all(1), more = open_all(3);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i += test_quick() ? 2 : 1)
        for (int mode = 0; mode < 3; mode++)
            for (unsigned flags = 0; flags < (test_quick() ? 4u : 8u); flags++) {
                prod p = prod_new(shapes[i].m, shapes[i].n, shapes[i].k, mode,
                                  flags | (mode ? 48 : 80));
                half_check(&c, &more, &p);
                prod_free(&p);
            }
    /* Sums that are cut. */
    for (unsigned flags = 48; flags < 52; flags++)
        for (int mode = 0; mode < 3; mode++) {
            prod p = prod_new(19, 40, 2 * GEMM_DEPTH + 35, mode, flags);
            half_check(&c, &more, &p);
            prod_free(&p);
        }
    close_all(&c);
    close_all(&more);
}

/* Infinities, NaN and zeros of both signs go where arithmetic sends them. */
TEST(special_values) {
    static const float special[] = {0.0f, -0.0f, INFINITY, -INFINITY, FLT_MAX, FLT_MIN, 1e-45f, 1};
    contexts c = open_all(1);
    prod p = prod_new(13, 35, 3, GEMM_STORE, 0);
    for (int i = 0; i < p.m; i++)
        for (int k = 0; k < p.k; k++)
            p.a[(size_t)i * p.lda + (size_t)k] = special[test_int(0, 7)];
    float *packed = prod_pack(c.ctx[0], &p);
    for (int t = 0; t < c.n; t++) {
        size_t nc = (size_t)p.m * p.ldc;
        float *out = test_floats(nc);
        gemm_args g = prod_args(c.ctx[t], &p, packed, out, NULL);
        run(c.ctx[t], &g);
        for (int i = 0; i < p.m; i++)
            for (int j = 0; j < p.n; j++) {
                float x = out[(size_t)i * p.ldc + (size_t)j], w = prod_chain(&p, i, j);
                if (isnan(w)) CHECK(isnan(x));
                else CHECK_BITS(&x, &w, 1);
            }
        test_floats_free(out);
    }
    test_floats_free(packed);
    prod_free(&p);
    close_all(&c);
}

TEST(nothing_to_do) {
    contexts c = open_all(2);
    for (int t = 0; t < c.n; t++) {
        float *out = test_floats(4);
        gemm_args g = {.m = 0, .n = 4, .t = {.k = 3, .c = out, .ldc = 4}};
        run(c.ctx[t], &g);
        g.m = 1, g.n = 0;
        run(c.ctx[t], &g);
        CHECK(test_poisoned(out, 4) && test_margins(out, 4));
        test_floats_free(out);
    }
    close_all(&c);
}

TEST_MAIN(CASE(pack_layout), CASE(every_m_and_n), CASE(every_k), CASE(every_tile),
          CASE(large_with_threads), CASE(row_alone), CASE(sum_in_parts), CASE(block_of_panels),
          CASE(long_sums), CASE(half_products), CASE(special_values), CASE(nothing_to_do))
