/* The vocabulary and the row kernels. Polynomials are compared with double
 * precision, in units in the last place; every kernel of every table with its plain-C twin, bit
 * for bit, between margins of NaN; the twins with their formulas. */

#include "../rlhf.c"
#include "test.h"

/* ---- polynomials ----------------------------------------------------------------------------- */

/* Distance in units of the last place of the exact value (of the smallest denormal, below that). */
static double ulps(float got, double exact) {
    int e;
    frexp(exact, &e);
    return fabs((double)got - exact) / ldexp(1, e - 24 < -149 ? -149 : e - 24);
}

typedef struct poly {
    const char *name;
    double (*exact)(double);
    float low, high; /* magnitudes that are compared with double precision */
    bool negative;   /* negative numbers too */
    double bound;    /* ulps: the largest error over all floats of the range, rounded up */
} poly;

/* Measured over every float of the range: 1.0103, 0.8265, 1.3303, 1.5768, 1.5642, 1.2549. */
static const poly polys[] = {{"exp", exp, 0, 104, true, 1.011},
                             {"log", log, 0, FLT_MAX, false, 0.827},
                             {"tanh", tanh, 0, FLT_MAX, true, 1.331},
                             {"sin", sin, 0, 1e5f, true, 1.577},
                             {"cos", cos, 0, 1e5f, true, 1.565},
                            {"erf", erf, 0, FLT_MAX, true, 1.255}};
enum { POLYS = sizeof polys / sizeof *polys };

static void poly_map(const k_table *k, int which, int n, const float *x, float *y) {
    float other[256];
    switch (which) {
    case 0: k->exp(n, x, y); return;
    case 1: k->log(n, x, y); return;
    case 2: k->tanh(n, x, y); return;
    case 3: k->sincos(n, x, y, other); return;
    case 4: k->sincos(n, x, other, y); return;
    default: k->erf(n, x, y); return;
    }
}

static float poly_scalar(int which, float x) {
    float s, c;
    if (which == 5) return v_erf1(x);
    if (which > 2) v_sincos1(x, &s, &c);
    return which == 0 ? v_exp1(x) : which == 1 ? v_log1(x) : which == 2 ? v_tanh1(x)
         : which == 3 ? s : c;
}

/* The same value, where all NaN are one. */
static bool same(float a, float b) {
    return isnan(a) ? isnan(b) : memcmp(&a, &b, sizeof a) == 0;
}

/* 256 floats, each `stride` patterns from the last, beginning at pattern `at`. */
static void poly_block(const poly *f, int which, uint32_t at, uint32_t stride, double *worst) {
    float x[256], y[256], z[256];
    for (int i = 0; i < 256; i++) {
        uint32_t bits = at + (uint32_t)i * stride;
        memcpy(x + i, &bits, sizeof bits);
        /* Signals are not kept: quiet ones only. Angles end where a quadrant fits an int. */
        if (isnan(x[i]) || ((which == 3 || which == 4) && fabsf(x[i]) > 1e9f)) x[i] = NAN;
        y[i] = poly_scalar(which, x[i]);
    }
    for (int t = 0; t < K_TABLES; t++) {
        if (!k_tables[t]->available() || k_tables[t] == &k_ref) continue;
        poly_map(k_tables[t], which, 256, x, z);
        for (int i = 0; i < 256; i++)
            if (!same(y[i], z[i]))
                test_fail(__FILE__, __LINE__, "%s(%.9g) = %.9g, but %.9g by %s", f->name,
                          (double)x[i], (double)y[i], (double)z[i], k_tables[t]->name);
    }
    for (int i = 0; i < 256; i++) {
        double exact = f->exact((double)x[i]);
        float a = fabsf(x[i]);
        if (isnan(x[i]) || a < f->low || a > f->high || (!f->negative && x[i] < 0)) continue;
        if (isinf(exact) || fabs(exact) > (double)FLT_MAX) {
            CHECK(y[i] == (exact > 0 ? INFINITY : -INFINITY));
            continue;
        }
        double off = ulps(y[i], exact);
        if (!(off <= f->bound))
            test_fail(__FILE__, __LINE__, "%s(%.9g) = %.9g, off by %.4f ulp", f->name,
                      (double)x[i], (double)y[i], off);
        if (off > *worst) *worst = off;
    }
}

/* Over all 2^32 patterns in equal steps; prime, so that low bits vary. */
static void poly_check(int which) {
    uint32_t stride = test_quick() ? 65537 : 1021;
    double worst = 0;
    uint64_t count = (UINT64_C(1) << 32) / stride / 256;
    for (uint64_t b = 0; b < count; b++)
        poly_block(polys + which, which, (uint32_t)(b * 256 * stride), stride, &worst);
    CHECK(worst > 0.5 * polys[which].bound); /* the bound says something */
}

TEST(exp_everywhere) { poly_check(0); }
TEST(log_everywhere) { poly_check(1); }
TEST(tanh_everywhere) { poly_check(2); }
TEST(sin_everywhere) { poly_check(3); }
TEST(cos_everywhere) { poly_check(4); }
TEST(erf_everywhere) { poly_check(5); }

/* Every float of the intervals that are used most, in which no step may be missed. */
TEST(dense_intervals) {
    static const struct { int which; float from; } intervals[] = {
        {0, -0.34657f}, {0, 0.34657f}, {0, -87.33f}, {1, 0.70710f}, {1, 1.0f},
        {1, 1.41421f},  {2, 0.62499f}, {2, 9.0f},    {3, 0.78539f}, {4, 0.78539f},
        {5, 0.84374f},  {5, 3.9f}};
    for (size_t i = 0; i < sizeof intervals / sizeof *intervals; i++) {
        uint32_t at;
        double worst = 0;
        memcpy(&at, &intervals[i].from, sizeof at);
        for (uint32_t b = 0; b < (test_quick() ? 2u : 40u); b++)
            poly_block(polys + intervals[i].which, intervals[i].which, at + b * 256, 1, &worst);
    }
}

TEST(exact_values) {
    float s, c;
    CHECK(v_exp1(0) == 1 && v_exp1(-0.0f) == 1 && v_log1(1) == 0 && v_tanh1(0) == 0);
    CHECK(v_exp1(INFINITY) == INFINITY && v_exp1(-INFINITY) == 0 && isnan(v_exp1(NAN)));
    CHECK(v_exp1(88.72f) < INFINITY && v_exp1(88.73f) == INFINITY && v_exp1(FLT_MAX) == INFINITY);
    CHECK(v_exp1(-103.9f) == 0x1p-149f && v_exp1(-104) == 0 && v_exp1(-FLT_MAX) == 0);
    CHECK(v_log1(0) == -INFINITY && v_log1(-0.0f) == -INFINITY && v_log1(INFINITY) == INFINITY);
    CHECK(isnan(v_log1(-1)) && isnan(v_log1(-INFINITY)) && isnan(v_log1(NAN)));
    CHECK(v_tanh1(INFINITY) == 1 && v_tanh1(-INFINITY) == -1 && isnan(v_tanh1(NAN)));
    CHECK(v_erf1(INFINITY) == 1 && v_erf1(-INFINITY) == -1 && isnan(v_erf1(NAN)));
    CHECK(v_erf1(0) == 0 && signbit(v_erf1(-0.0f)) && v_erf1(4) == 1 && v_erf1(-FLT_MAX) == -1);
    CHECK(v_tanh1(20) == 1 && v_tanh1(-FLT_MAX) == -1 && v_tanh1(1e-30f) == 1e-30f);
    v_sincos1(0, &s, &c);
    CHECK(s == 0 && c == 1);
    CHECK(v_sigmoid1(0) == 0.5f && v_sigmoid1(200) == 1 && v_sigmoid1(-200) == 0);
    for (int i = -125; i < 128; i++) CHECK_NEAR(v_log1(ldexpf(1, i)), i * log(2), 1e-5);
}

/* Not only close but these bits, on every machine: a hash of all values that are numbers. */
TEST(the_same_on_every_machine) {
    static const uint64_t want[POLYS] = {0xd4f59ca9f0082083, 0x96df7f8fd7b8ac96,
                                          0xddb27300751c8b39, 0xac15761199ecbc62,
                                          0xf3cb9b1da8b76bbc, 0x142822457d3a1588};
    for (int which = 0; which < POLYS; which++) {
        uint64_t hash = 14695981039346656037u;
        for (uint64_t b = 0; b < UINT64_C(1) << 32; b += 65537) {
            uint32_t bits = (uint32_t)b;
            float x, y;
            memcpy(&x, &bits, sizeof x);
            if (isnan(x) || ((which == 3 || which == 4) && fabsf(x) > 1e9f)) continue;
            y = poly_scalar(which, x);
            if (isnan(y)) continue;
            memcpy(&bits, &y, sizeof bits);
            hash = (hash ^ bits) * 1099511628211u;
        }
        if (hash != want[which])
            test_fail(__FILE__, __LINE__, "%s: %016" PRIx64, polys[which].name, hash);
    }
}

/* ---- every kernel against its twin ----------------------------------------------------------- */

enum { INS = 3, OUTS = 3, VALS = 3 };

/* Operands of one call: three inputs in [-3, 3), three outputs that begin with numbers of the same
 * kind (in place, accumulated), and results by value. */
typedef struct call {
    int n;
    const float *in[INS];
    float *out[OUTS]; /* [0] holds 2 n floats */
    double val[VALS];
} call;

typedef void call_fn(const k_table *k, call *c);

static void c_exp(const k_table *k, call *c) { k->exp(c->n, c->in[0], c->out[1]); }
static void c_tanh(const k_table *k, call *c) { k->tanh(c->n, c->in[0], c->out[1]); }
static void c_add(const k_table *k, call *c) { k->add(c->n, c->in[0], c->out[1]); }
static void c_gelu(const k_table *k, call *c) { k->gelu(c->n, c->in[0], c->out[1]); }
static void c_gelu_here(const k_table *k, call *c) { k->gelu(c->n, c->out[1], c->out[1]); }
static void c_sincos(const k_table *k, call *c) { k->sincos(c->n, c->in[0], c->out[1], c->out[2]); }
static void c_scale(const k_table *k, call *c) { k->scale(c->n, c->out[1], 0.77f); }
static void c_log(const k_table *k, call *c) {
    for (int i = 0; i < c->n; i++) c->out[1][i] = fabsf(c->in[0][i]);
    k->log(c->n, c->out[1], c->out[1]);
}
static void c_dot(const k_table *k, call *c) {
    c->val[0] = (double)k->dot(c->n, c->in[0], c->in[1]);
}
static void c_rms(const k_table *k, call *c) {
    float r;
    k->rms(c->n, c->in[0], c->in[1], c->n % 2 ? 1.0f : 0.0f, 1e-5f, c->out[1], &r);
    c->val[0] = (double)r;
}
static void c_rms_bwd(const k_table *k, call *c) {
    k->rms_bwd(c->n, c->in[0], c->in[1], c->in[2], c->n % 2 ? 1.0f : 0.0f, 0.6f, c->out[1]);
}
static void c_ln(const k_table *k, call *c) {
    float m, r;
    k->ln(c->n, c->in[0], c->in[1], c->in[2], 1e-5f, c->out[1], &m, &r);
    c->val[0] = (double)m;
    c->val[1] = (double)r;
}
static void c_ln_bwd(const k_table *k, call *c) {
    k->ln_bwd(c->n, c->in[0], c->in[1], c->in[2], 0.3f, 0.6f, c->out[1]);
}
static void c_norm_dw(const k_table *k, call *c) {
    k->norm_dw(c->n, c->in[0], c->in[1], 0.3f, 0.6f, c->out[1]);
}
static void c_erf(const k_table *k, call *c) { k->erf(c->n, c->in[0], c->out[1]); }
static void c_gelu_erf(const k_table *k, call *c) {
    k->gelu_erf(c->n, c->in[0], c->out[1]);
    k->gelu_erf(c->n, c->out[2], c->out[2]);
}
static void c_gelu_erf_bwd(const k_table *k, call *c) {
    k->gelu_erf_bwd(c->n, c->out[1], c->out[2]);
}
static void c_geglu(const k_table *k, call *c) { k->geglu(c->n, c->in[0], c->in[1], c->out[1]); }
static void c_geglu_bwd(const k_table *k, call *c) {
    k->geglu_bwd(c->n, c->out[0], c->out[1], c->out[2]);
}
static void c_cap(const k_table *k, call *c) { k->cap(c->n, c->out[1], 0.4f, 2.5f); }
static void c_cap_bwd(const k_table *k, call *c) {
    k->cap_bwd(c->n, c->in[0], 0.3f, c->out[1]);
}
static void c_gelu_bwd(const k_table *k, call *c) {
    k->gelu_bwd(c->n, c->out[1], c->out[2]);
}
static void c_glu(const k_table *k, call *c) { k->glu(c->n, c->in[0], c->in[1], c->out[1]); }
static void c_glu_bwd(const k_table *k, call *c) {
    k->glu_bwd(c->n, c->out[0], c->out[1], c->out[2]);
}
static void c_rope(const k_table *k, call *c) {
    k->rope(c->n, c->out[0], c->in[0], c->in[1], c->n % 2 ? 1.0f : -1.0f);
}
static void c_stats(const k_table *k, call *c) {
    k_stats s = k->stats(c->n, c->in[0], 1.3f);
    c->val[0] = (double)s.max;
    c->val[1] = (double)s.lse;
    c->val[2] = (double)s.entropy;
}
static void c_ce(const k_table *k, call *c) { k->ce(c->n, c->out[1], 1.3f, 2.5f, -0.7f); }
static void c_kl(const k_table *k, call *c) {
    c->val[0] = k->kl(c->n, c->in[0], c->in[1], 0.8f, 3.0f, 4.0f);
}
static void c_softmax(const k_table *k, call *c) {
    float max = c->n % 3 ? -INFINITY : 1.5f, sum = c->n % 3 ? 0 : 2.0f;
    c->val[2] = (double)k->softmax(c->n, c->out[1], 0.9f, &max, &sum);
    c->val[0] = (double)max;
    c->val[1] = (double)sum;
}
static void c_prob(const k_table *k, call *c) { k->prob(c->n, c->out[1], 0.9f, 1.7f); }
static void c_ds(const k_table *k, call *c) { k->ds(c->n, c->in[0], c->out[1], 0.4f, 0.35f); }
static void c_adam(const k_table *k, call *c) {
    k_adam a = {.lr = 1e-2f, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f, .decay = 0.999f,
                .rest1 = 0.1f, .rest2 = 1e-3f, .fix1 = 2.5f, .fix2 = 130.0f, .clip = 0.8f};
    float *v = c->out[0], *g = v + c->n;
    for (int i = 0; i < c->n; i++) v[i] = fabsf(v[i]); /* second moments */
    k->adam(c->n, c->out[1], g, c->out[2], v, &a);
    for (int i = 0; i < c->n; i++) CHECK(g[i] == 0);
}

/* Shapes of its own: n numbers, whatever n is, as rows that overlap or as rows of one number. */
static void c_panel(const k_table *k, call *c) {
    float y[RLHF_LANES * 41];
    int n = c->n / RLHF_LANES < 41 ? c->n / RLHF_LANES : 41;
    k->panel(n, c->in[0], (size_t)n, y);
    memcpy(c->out[1], y, (size_t)(n * RLHF_LANES) * sizeof *y);
    for (int i = 0; i < n; i++)
        for (int l = 0; l < RLHF_LANES; l++)
            CHECK(c->out[1][i * RLHF_LANES + l] == c->in[0][l * n + i]);
}
/* Rows of pairs, any bits. */
static void c_apart(const k_table *k, call *c) {
    float y[RLHF_LANES * 2 * 41];
    int n = c->n / RLHF_LANES < 41 ? c->n / RLHF_LANES : 41;
    k->apart(n, c->in[0], (size_t)n, y);
    for (int i = 0; i < 2 * n; i++)
        for (int l = 0; l < RLHF_LANES; l++) {
            uint32_t pair = (uint32_t)v_int1(c->in[0][l * n + i / 2]);
            uint32_t want = i % 2 ? pair & 0xffff0000u : pair << 16;
            CHECK((uint32_t)v_int1(y[i * RLHF_LANES + l]) == want);
        }
}
static void c_strips(const k_table *k, call *c) {
    (void)k;
    static const int widths[] = {RLHF_LANES, 8, 6, 5};
    int w = widths[c->n % 4], strips = 1 + c->n % 3, rows = c->n / (w * strips);
    k_strips(rows, strips, w, c->in[1], (size_t)(w * strips), c->out[2]);
    for (int i = 0; i < rows * strips * w; i++) {
        int row = i / (w * strips), strip = i / w % strips;
        CHECK(c->out[2][(strip * rows + row) * w + i % w] == c->in[1][i]);
    }
}

static void c_sumsq(const k_table *k, call *c) { c->val[0] = k->sumsq(c->n, c->in[0]); }
/* The processor's own conversion may take denormals for zero. */
static bool is_half(uint16_t got, float x) {
    return got == v_half1(x) || (fabsf(x) < FLT_MIN && (got & 0x7fff) == 0);
}
static void c_half(const k_table *k, call *c) {
    uint16_t y[4096];
    int n = c->n < 2000 ? c->n : 2000, whole = (n + 15) / 16 * 16;
    memset(y, 0xee, sizeof y);
    k->bf16.half(n, c->in[0], 48, y);
    for (int i = 0; i < whole; i++) {
        uint16_t got = y[i / 32 * 48 + i % 32];
        CHECK(is_half(got, i < n ? c->in[0][i] : 0));
        float x = i < n ? fabsf(c->in[0][i]) : 0;
        if (x > FLT_MIN && x < 1e38f) CHECK(fabsf(fabsf(v_wide1(got)) - x) <= x * 0x1p-8f);
    }
    for (int i = 32; i + 16 <= whole; i += 32) CHECK_EQ_I(y[i / 32 * 48 - 1], 0xeeee);
}
/* Any sixteen bits, those of NaN too; what lies behind y is left alone. */
static void widened(k_wide_fn *widen, float one(uint16_t), const call *c) {
    uint16_t h[2000];
    float y[2001] = {0};
    int n = c->n < 2000 ? c->n : 2000;
    memcpy(h, c->in[0], (size_t)n * sizeof *h);
    y[n] = 7;
    widen(n, h, y);
    for (int i = 0; i < n; i++) CHECK(v_int1(y[i]) == v_int1(one(h[i])));
    CHECK(y[n] == 7);
}
static float upper_half(uint16_t h) { return v_bits1((int32_t)((uint32_t)h << 16)); }
static void c_wide(const k_table *k, call *c) { widened(k->wide, upper_half, c); }
static float half_precision(uint16_t h) {
    double f = (h & 1023) * 0x1p-24, e = h >> 10 & 31;
    if (e > 0) f = ldexp(1024 + (h & 1023), (int)e - 25);
    if (e == 31) f = (double)INFINITY;
    if (e == 31 && h & 1023) /* NaN, made quiet */
        return v_bits1((int32_t)((h & 0x8000u) << 16 | 0x7fc00000u | (h & 1023u) << 13));
    return (float)(h >> 15 ? -f : f);
}
static void c_ieee(const k_table *k, call *c) { widened(k->ieee, half_precision, c); }
static void c_pairs(const k_table *k, call *c) {
    static const int widths[] = {RLHF_LANES, 8, 6, 5};
    int w = widths[c->n % 4], strips = 1 + c->n % 2, rows = c->n / (w * strips);
    int pairs = rows / 2 + 2;
    float y[RLHF_LANES * 2 * 600];
    if (pairs > 600) rows = 1100, pairs = 552;
    k->bf16.pairs(rows, pairs, strips, w, c->in[1], (size_t)(w * strips), y);
    for (int i = 0; i < strips * pairs * w; i++) {
        int strip = i / (pairs * w), p = i / w % pairs, l = i % w;
        for (int h = 0; h < 2; h++) {
            float x = 2 * p + h < rows ? c->in[1][((2 * p + h) * strips + strip) * w + l] : 0;
            CHECK(is_half((uint16_t)((uint32_t)v_int1(y[i]) >> 16 * h), x));
        }
    }
}

static const struct { const char *name; call_fn *run; } calls[] = {
    {"exp", c_exp},         {"log", c_log},       {"tanh", c_tanh},         {"add", c_add},
    {"gelu", c_gelu},       {"gelu", c_gelu_here}, {"sincos", c_sincos},    {"dot", c_dot},
    {"rms", c_rms},         {"rms_bwd", c_rms_bwd}, {"ln", c_ln},           {"ln_bwd", c_ln_bwd},
    {"norm_dw", c_norm_dw}, {"gelu_bwd", c_gelu_bwd}, {"glu", c_glu},       {"glu_bwd", c_glu_bwd},
    {"rope", c_rope},       {"stats", c_stats},   {"ce", c_ce},             {"kl", c_kl},
    {"softmax", c_softmax}, {"prob", c_prob},     {"ds", c_ds},             {"scale", c_scale},
    {"erf", c_erf},         {"gelu_erf", c_gelu_erf}, {"gelu_erf_bwd", c_gelu_erf_bwd},
    {"geglu", c_geglu},     {"geglu_bwd", c_geglu_bwd}, {"cap", c_cap},     {"cap_bwd", c_cap_bwd},
    {"adam", c_adam},       {"panel", c_panel},   {"strips", c_strips}, {"apart", c_apart},
    {"half", c_half},       {"pairs", c_pairs},   {"sumsq", c_sumsq},
    {"wide", c_wide},       {"ieee", c_ieee}};

/* Every kernel has a line above: the table's functions (gelu twice), strips, which has one for all
 * tables, and what packs bfloat16. Tiles are test_gemm.c's. */
_Static_assert(sizeof calls / sizeof *calls - 4 ==
                   (offsetof(k_table, f32) - offsetof(k_table, exp)) / sizeof(k_map_fn *),
               "a kernel without a test");

static bool any_nan(const float *x, int n) {
    for (int i = 0; i < n; i++)
        if (isnan(x[i])) return true;
    return false;
}

static call call_new(int n, float *const *in, float *const *start) {
    call c = {.n = n, .in = {in[0], in[1], in[2]}};
    for (int i = 0; i < OUTS; i++) {
        size_t count = (size_t)(i == 0 ? 2 * n : n);
        c.out[i] = test_floats(count);
        memcpy(c.out[i], start[i], count * sizeof(float));
    }
    return c;
}

static void call_free(call *c) {
    for (int i = 0; i < OUTS; i++) test_floats_free(c->out[i]);
}

static void call_compare(const char *name, const k_table *k, const call *want, const call *got) {
    int before = test_failures, n = want->n;
    CHECK(memcmp(want->val, got->val, sizeof want->val) == 0);
    CHECK(!isnan(got->val[0]) && !isnan(got->val[1]) && !isnan(got->val[2]));
    for (int i = 0; i < OUTS; i++) {
        CHECK_BITS(got->out[i], want->out[i], i == 0 ? 2 * n : n);
        CHECK(!any_nan(got->out[i], i == 0 ? 2 * n : n));
        CHECK(test_margins(got->out[i], (size_t)(i == 0 ? 2 * n : n)));
    }
    if (test_failures > before)
        test_fail(__FILE__, __LINE__, "above: %s of %s with n = %d", name, k->name, n);
}

/* All kernels with operands of n floats whose magnitudes go up to `size`. */
static void twins(int n, float size) {
    float *in[INS], *start[OUTS];
    for (int i = 0; i < INS; i++) test_fill(in[i] = test_floats((size_t)n), (size_t)n, -size, size);
    for (int i = 0; i < OUTS; i++) {
        size_t count = (size_t)(i == 0 ? 2 * n : n);
        test_fill(start[i] = test_floats(count), count, -size, size);
    }
    for (size_t f = 0; f < sizeof calls / sizeof *calls; f++) {
        call want = call_new(n, in, start);
        calls[f].run(&k_ref, &want);
        call_compare(calls[f].name, &k_ref, &want, &want);
        for (int t = 0; t < K_TABLES; t++) {
            if (!k_tables[t]->available() || k_tables[t] == &k_ref) continue;
            call got = call_new(n, in, start);
            calls[f].run(k_tables[t], &got);
            call_compare(calls[f].name, k_tables[t], &want, &got);
            call_free(&got);
        }
        call_free(&want);
    }
    for (int i = 0; i < INS; i++) test_floats_free(in[i]);
    for (int i = 0; i < OUTS; i++) test_floats_free(start[i]);
}

TEST(twins_of_every_length) {
    for (int n = 1; n <= 70; n++)
        for (int i = 0; i < (test_quick() ? 1 : 5); i++) twins(n, 3);
}

TEST(twins_long) {
    static const int ns[] = {127, 128, 129, 500, 1023, 4097, 20000};
    for (int i = 0; i < (test_quick() ? 5 : 7); i++) twins(ns[i], 3);
}

/* Magnitudes at which exp overflows or vanishes, and tiny ones. */
TEST(twins_extreme) {
    for (int n = 1; n <= 70; n += test_quick() ? 9 : 1) {
        twins(n, 25);
        twins(n, 1e-20f);
        twins(n, 1e-38f);
    }
}

/* Rows that end where memory does: nothing behind them is read or written. */
TEST(ends_of_memory) {
    enum { MOST = 40 };
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *map = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(map != MAP_FAILED);
    REQUIRE(mprotect(map + page, page, PROT_NONE) == 0);
    for (int n = 1; n <= MOST; n++) {
        float *end = (float *)(void *)(map + page) - n, x[MOST], want[MOST];
        test_fill(x, (size_t)n, -3, 3);
        for (int t = 0; t < K_TABLES; t++) {
            const k_table *k = k_tables[t];
            if (!k->available()) continue;
            float max = -INFINITY, sum = 0, max2 = max, sum2 = sum;
            memcpy(want, x, sizeof want);
            memcpy(end, x, (size_t)n * sizeof *end);
            k_r_softmax(n, want, 0.5f, &max, &sum);
            k->softmax(n, end, 0.5f, &max2, &sum2);
            CHECK_BITS(end, want, n);
            CHECK_BITS(&sum2, &sum, 1);
            k_r_rope(n / 2, want, x, x, 1);
            k->rope(n / 2, end, x, x, 1);
            CHECK_BITS(end, want, n);
        }
    }
    munmap(map, 2 * page);
}

/* Infinities and NaN reach the same places; where one alone is undefined, both are NaN. */
TEST(special_values) {
    static const float special[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, FLT_MAX, -FLT_MAX,
                                    1e-45f, -1e-45f, FLT_MIN, 1, -1, 88.8f, -104.5f, 1e19f};
    enum { N = sizeof special / sizeof *special };
    for (int t = 0; t < K_TABLES; t++) {
        const k_table *k = k_tables[t];
        float x[N], y[N], z[N], d[N];
        if (!k->available()) continue;
        memcpy(x, special, sizeof x);
        k->exp(N, x, y);
        k->log(N, x, z);
        k->tanh(N, x, d);
        for (int i = 0; i < N; i++)
            CHECK(same(y[i], v_exp1(x[i])) && same(z[i], v_log1(x[i])) &&
                  same(d[i], v_tanh1(x[i])));
        k->gelu(N, x, y);
        k_r_gelu(N, x, z);
        for (int i = 0; i < N; i++) CHECK(same(y[i], z[i]));
        memcpy(y, x, sizeof y);
        memcpy(z, x, sizeof z);
        k->ce(N, y, 1, 0.5f, 2);
        k_r_ce(N, z, 1, 0.5f, 2);
        for (int i = 0; i < N; i++) CHECK(same(y[i], z[i]));
    }
}

/* A row with NaN or an infinity in it does not pass for a sound one. */
TEST(bad_rows_show) {
    for (int t = 0; t < K_TABLES; t++)
        for (int n = 1; n <= 40; n += 3)
            for (int i = 0; i < n; i += 2) {
                if (!k_tables[t]->available()) continue;
                float x[40], w[40], y[40], r;
                for (int j = 0; j < n; j++) x[j] = w[j] = 0.01f * (float)j + 0.5f;
                x[i] = NAN;
                CHECK(isnan(k_tables[t]->dot(n, x, w)));
                k_tables[t]->rms(n, x, w, 0, 1e-5f, y, &r);
                CHECK(isnan(r));
                k_stats s = k_tables[t]->stats(n, x, 1);
                CHECK(isnan(s.lse) && isnan(s.entropy));
                CHECK(isnan(k_tables[t]->kl(n, x, w, 1, 2, 2)));
            }
}

/* ---- twins against formulas ------------------------------------------------------------------ */

TEST(statistics_of_a_row) {
    for (int n = 1; n <= 3000; n = n * 3 / 2 + 1)
        for (int wide = 0; wide < 2; wide++) {
            float *x = test_floats((size_t)n), *y = test_floats((size_t)n);
            float scale = wide ? 3.0f : 0.7f;
            test_fill(x, (size_t)n, -8, 8);
            test_fill(y, (size_t)n, -8, 8);
            double max = -INFINITY, sum = 0, sum2 = 0, entropy = 0, kl = 0;
            for (int i = 0; i < n; i++) max = fmax(max, (double)x[i] * (double)scale);
            for (int i = 0; i < n; i++) {
                sum += exp((double)x[i] * (double)scale);
                sum2 += exp((double)y[i] * (double)scale);
            }
            for (int i = 0; i < n; i++) {
                double lp = (double)x[i] * (double)scale - log(sum);
                entropy -= exp(lp) * lp;
                kl += exp(lp) * (lp - ((double)y[i] * (double)scale - log(sum2)));
            }
            k_stats s = k_r_stats(n, x, scale);
            CHECK_NEAR(s.max, max, 2e-6);
            CHECK_NEAR(s.lse, log(sum), 4e-6);
            CHECK_NEAR(s.entropy, entropy, 2e-6 * (1 + entropy));
            CHECK_NEAR(k_r_kl(n, x, y, scale, s.lse, (float)log(sum2)), kl, 4e-6 * (1 + kl));
            test_floats_free(x), test_floats_free(y);
        }
}

/* A row in tiles: what was accumulated is corrected by the factor that each tile returns. */
TEST(online_softmax) {
    for (int n = 1; n <= 300; n += 13) {
        float x[300], p[300], max = -INFINITY, sum = 0;
        double m = -INFINITY, total = 0;
        test_fill(x, (size_t)n, -10, 10);
        memcpy(p, x, sizeof p);
        for (int i = 0; i < n; i += 64) {
            int w = n - i < 64 ? n - i : 64;
            float fix = k_r_softmax(w, p + i, 0.5f, &max, &sum);
            CHECK(i ? fix <= 1 : fix == 0);
            for (int j = 0; j < i; j++) p[j] *= fix;
        }
        for (int i = 0; i < n; i++) m = fmax(m, 0.5 * (double)x[i]);
        for (int i = 0; i < n; i++) total += exp(0.5 * (double)x[i] - m);
        CHECK_NEAR(max, m, 1e-9);
        CHECK_NEAR(sum, total, 2e-6 * total);
        for (int i = 0; i < n; i++) CHECK_NEAR(p[i], exp(0.5 * (double)x[i] - m), 2e-6);
    }
}

/* Rotating there and back is the identity, and keeps lengths. */
TEST(rotation) {
    for (int half = 1; half <= 40; half++) {
        float angle[40], s[40], c[40], x[80], y[80];
        test_fill(angle, (size_t)half, -50, 50);
        test_fill(x, 2 * (size_t)half, -1, 1);
        k_r_sincos(half, angle, s, c);
        memcpy(y, x, sizeof y);
        k_r_rope(half, y, c, s, 1);
        for (int i = 0; i < half; i++) {
            double a = (double)angle[i], p = (double)x[i], q = (double)x[half + i];
            CHECK_NEAR(y[i], p * cos(a) - q * sin(a), 4e-7);
            CHECK_NEAR(y[half + i], q * cos(a) + p * sin(a), 4e-7);
        }
        k_r_rope(half, y, c, s, -1);
        for (int i = 0; i < 2 * half; i++) CHECK_NEAR(y[i], x[i], 4e-7);
    }
}

/* ---- AdamW ----------------------------------------------------------------------------------- */

/* Twenty steps on weights that double precision follows; with and without decay and clipping. */
TEST(adam_formula) {
    enum { N = 50 };
    for (int variant = 0; variant < 4; variant++) {
        double lr = 3e-3, b1 = 0.9, b2 = variant % 2 ? 0.95 : 0.999, eps = 1e-8;
        double decay = variant & 1 ? 0.1 : 0, clip = variant & 2 ? 0.25 : 1, top = 0;
        float p[N], g[N], m[N] = {0}, v[N] = {0};
        double P[N], M[N] = {0}, V[N] = {0};
        test_fill(p, N, -1, 1);
        for (int i = 0; i < N; i++) P[i] = (double)p[i];
        for (int step = 1; step <= 20; step++) {
            k_adam a = {.lr = (float)lr, .beta1 = (float)b1, .beta2 = (float)b2, .eps = (float)eps,
                        .decay = (float)(1 - lr * decay), .clip = (float)clip,
                        .rest1 = (float)(1 - b1), .rest2 = (float)(1 - b2),
                        .fix1 = (float)(1 / (1 - pow(b1, step))),
                        .fix2 = (float)(1 / (1 - pow(b2, step)))};
            test_fill(g, N, -1, 1);
            float used[N];
            memcpy(used, g, sizeof used);
            k_r_adam(N, p, used, m, v, &a);
            for (int i = 0; i < N; i++) {
                double u = clip * (double)g[i];
                M[i] = b1 * M[i] + (1 - b1) * u;
                V[i] = b2 * V[i] + (1 - b2) * u * u;
                double root = sqrt(V[i] / (1 - pow(b2, step))) + eps;
                P[i] -= lr * decay * P[i];
                P[i] -= lr * (M[i] / (1 - pow(b1, step))) / root;
                top = fmax(top, fabs(P[i] - (double)p[i]));
            }
        }
        CHECK_NEAR(top, 0, 1.5e-6); /* a rounding a step */
    }
}

/* By hand: the first step goes by lr against the sign of any gradient, a zero one leaves all. */
TEST(adam_by_hand) {
    for (int t = 0; t < K_TABLES; t++) {
        if (!k_tables[t]->available()) continue;
        float p[4] = {1, 1, 1, 1}, g[4] = {0.5f, -2000, 0, 1e-3f}, m[4] = {0}, v[4] = {0};
        k_adam a = {.lr = 0.1f, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f, .decay = 1,
                    .rest1 = 0.1f, .rest2 = 1e-3f, .fix1 = 10, .fix2 = 1000, .clip = 1};
        k_tables[t]->adam(4, p, g, m, v, &a);
        CHECK_NEAR(p[0], 0.9, 2e-7);
        CHECK_NEAR(p[1], 1.1, 2e-7);
        CHECK(p[2] == 1 && m[2] == 0 && v[2] == 0);
        CHECK_NEAR(p[3], 0.9, 1e-5);
        CHECK_NEAR(m[0], 0.05, 4e-9);
        CHECK_NEAR(v[0], 2.5e-4, 2e-11);
        float q[2] = {0.1f, -7.25f}, zero[2] = {0}, m2[2] = {0.3f, 1}, v2[2] = {0.2f, 1};
        float before[2] = {0.1f, -7.25f};
        a.lr = 0;
        k_tables[t]->adam(2, q, zero, m2, v2, &a);
        CHECK_BITS(q, before, 2); /* a rate of 0 changes nothing */
    }
}

/* Moments without gradients shrink to 0 and never stay denormal, which each later step would take
 * fifty times as long for; what is no number stays none. */
TEST(adam_forgets) {
    for (int t = 0; t < K_TABLES; t++) {
        if (!k_tables[t]->available()) continue;
        float p[19], g[19] = {0}, m[19], v[19];
        k_adam a = {.lr = 1e-3f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .decay = 1,
                    .rest1 = 0.1f, .rest2 = 0.05f, .fix1 = 1, .fix2 = 1, .clip = 1};
        for (int i = 0; i < 19; i++) p[i] = 1, m[i] = i % 2 ? -1 : 1, v[i] = 1;
        v[18] = NAN;
        for (int step = 1; step < 2000; step++) {
            k_tables[t]->adam(19, p, g, m, v, &a);
            for (int i = 0; i < 18; i++) {
                CHECK(m[i] == 0 || fabsf(m[i]) >= FLT_MIN);
                CHECK(v[i] == 0 || v[i] >= FLT_MIN);
            }
            if (step == 600) CHECK(m[0] > 0 && m[1] < 0 && v[0] > 0);
        }
        for (int i = 0; i < 18; i++) CHECK(m[i] == 0 && v[i] == 0 && p[i] == p[i]);
        CHECK(isnan(v[18]) && isnan(p[18]));
    }
}

/* ---- sums of squares, drawing ---------------------------------------------------------------- */

TEST(sum_of_squares) {
    for (int n = 0; n <= 2000; n = n < 70 ? n + 1 : n * 2) {
        float *x = test_floats((size_t)n);
        long double want = 0;
        test_fill(x, (size_t)n, -1, 1);
        for (int i = 0; i < n; i++) want += (long double)x[i] * (long double)x[i];
        CHECK_NEAR(k_r_sumsq(n, x), (double)want, 1e-15 * (double)want);
        for (int i = 0; i < n; i++) x[i] = (float)(i % 7 - 3);
        int64_t whole = 0;
        for (int i = 0; i < n; i++) whole += (i % 7 - 3) * (i % 7 - 3);
        CHECK(k_r_sumsq(n, x) == (double)whole);
        if (n) {
            x[n / 2] = 1e30f;
            CHECK(k_r_sumsq(n, x) > 9e59 && k_r_sumsq(n, x) < INFINITY);
            x[n / 2] = NAN;
            CHECK(isnan(k_r_sumsq(n, x)));
        }
        test_floats_free(x);
    }
}

/* Evenly spaced u hit every index as often as its probability says. */
TEST(draw_distribution) {
    enum { N = 600, DRAWS = 20000 };
    float x[N], scale = 1.25f;
    static int count[N];
    double p[N], sum = 0;
    int most = test_quick() ? 500 : DRAWS;
    test_fill(x, N, -3, 3);
    x[0] = x[256] = x[N - 1] = -INFINITY;
    for (int i = 0; i < N; i++) sum += p[i] = exp((double)x[i] * (double)scale);
    float lse = k_r_stats(N, x, scale).lse;
    memset(count, 0, sizeof count);
    for (int d = 0; d < most; d++) {
        int first = k_draw(k_tables[0], N, x, scale, lse, (d + 0.5) / most);
        CHECK(first >= 0 && first < N);
        count[first]++;
        for (int t = 1; t < K_TABLES && d % 100 == 0; t++)
            if (k_tables[t]->available())
                CHECK_EQ_I(k_draw(k_tables[t], N, x, scale, lse, (d + 0.5) / most), first);
    }
    for (int i = 0; i < N; i++) {
        CHECK_NEAR(count[i], p[i] / sum * most, 2);
        if (x[i] == -INFINITY) CHECK_EQ_I(count[i], 0);
    }
}

TEST(draw_edges) {
    float one = 3, few[5] = {-INFINITY, 0, 0, 0, -INFINITY}, far[3] = {0, 200, 0};
    float many[1000];
    for (int t = 0; t < K_TABLES; t++) {
        const k_table *k = k_tables[t];
        double top = 1 - 0x1p-53;
        if (!k->available()) continue;
        CHECK_EQ_I(k_draw(k, 1, &one, 1, 3, 0), 0);
        CHECK_EQ_I(k_draw(k, 1, &one, 1, 3, top), 0);
        float lse = k->stats(5, few, 1).lse;
        CHECK_EQ_I(k_draw(k, 5, few, 1, lse, 0), 1);
        CHECK_EQ_I(k_draw(k, 5, few, 1, lse, 0.34), 2);
        CHECK_EQ_I(k_draw(k, 5, few, 1, lse, top), 3);
        CHECK_EQ_I(k_draw(k, 5, few, 1, lse + 0.5f, top), 3); /* a total of 0.6: still the last */
        CHECK_EQ_I(k_draw(k, 2, few + 1, 1, 0, 1), 1); /* p = 1 is not above u = 1 */
        lse = k->stats(3, far, 1).lse;
        CHECK_EQ_I(k_draw(k, 3, far, 1, lse, 0), 1);
        CHECK_EQ_I(k_draw(k, 3, far, 1, lse, top), 1);
        for (int i = 0; i < 1000; i++) many[i] = 0;
        lse = k->stats(1000, many, 1).lse;
        for (int i = 0; i < 1000; i += 37)
            CHECK_EQ_I(k_draw(k, 1000, many, 1, lse, (i + 0.5) / 1000), i);
        many[999] = -INFINITY;
        CHECK_EQ_I(k_draw(k, 1000, many, 1, k->stats(1000, many, 1).lse, top), 998);
    }
}

/* ---- threads --------------------------------------------------------------------------------- */

/* One job: how often each output was computed, and by whom. */
typedef struct tally {
    _Atomic int count[64];
    _Atomic int bad;
    int spin;
} tally;

static void tally_range(void *arg, int64_t lo, int64_t hi, int thread) {
    tally *t = arg;
    if (thread < 0 || thread >= 5) t->bad = 1;
    for (int64_t i = lo; i < hi; i++) t->count[i]++;
    for (volatile int k = 0; k < t->spin; k++) {}
}

/* Jobs of all sizes, one behind the other, with more threads than processors: every output once,
 * whoever is late. */
TEST(every_piece_once) {
    rlhf_ctx *ctx = test_context("auto", 5);
    for (int job = 0; job < (test_quick() ? 20000 : 200000); job++) {
        tally t = {.spin = job % 7 * 20};
        int n = test_int(1, 64), grain = test_int(1, 9);
        par_for(ctx, n, grain, tally_range, &t);
        int wrong = t.bad;
        for (int i = 0; i < 64; i++) wrong += t.count[i] != (i < n);
        if (wrong) {
            test_fail(__FILE__, __LINE__, "job %d: n %d, grain %d", job, n, grain);
            break;
        }
    }
    rlhf_close(ctx);
}

/* A thread that comes when its job is over, while the next, larger one is being posted, takes
 * nothing. */
TEST(nothing_of_a_job_that_is_over) {
    rlhf_ctx *ctx = test_context("auto", 2);
    tally t = {0};
    par_for(ctx, 2, 1, tally_range, &t);
    par_team *team = ctx->team;
#ifdef _OPENMP
    par_job job;
    uint64_t number = atomic_load(&team->turn);
    CHECK(par_read(team, number, &job));
    par_work(team, &job, number, 1);
    atomic_store(&team->turn, number + 1);
    atomic_store(&team->n, 64);
    atomic_store(&team->units, 64);
    atomic_store(&team->pieces, PAR_PIECES);
    CHECK(!par_read(team, number, &job));
    par_work(team, &job, number, 1);
#endif
    (void)team;
    for (int i = 0; i < 64; i++) CHECK_EQ_I(t.count[i], i < 2);
    rlhf_close(ctx);
}

#ifdef _OPENMP
static void share_range(void *arg, int64_t lo, int64_t hi, int thread) {
    (void)lo, (void)thread;
    *(int64_t *)arg = hi;
}
#endif

/* The last unit of a share is that of its last piece. */
TEST(last_of_a_share) {
#ifdef _OPENMP
    uint64_t number = 0;
    for (int threads = 1; threads <= 5; threads++) {
        rlhf_ctx *ctx = test_context("auto", threads);
        for (int n = 1; n <= 80; n++) {
            int ends[81] = {0}, shares = threads < n ? threads : n, wrong = 0;
            for (int share = 0; share < shares; share++) {
                int64_t end = 0;
                int pieces = n / shares < PAR_PIECES ? n / shares : PAR_PIECES;
                par_job j = {share_range, &end, n, n, 1, shares, pieces};
                if (!share) number++;
                par_share(ctx->team, &j, number, share, 0);
                ends[end] = 1;
            }
            for (int i = 0; i < n; i++) wrong += par_last(ctx, n, i) != ends[i + 1];
            if (wrong) test_fail(__FILE__, __LINE__, "%d threads, n %d: %d", threads, n, wrong);
        }
        rlhf_close(ctx);
    }
#endif
}

TEST_MAIN(CASE(exp_everywhere), CASE(log_everywhere), CASE(tanh_everywhere), CASE(sin_everywhere),
          CASE(cos_everywhere), CASE(erf_everywhere), CASE(dense_intervals), CASE(exact_values),
          CASE(the_same_on_every_machine), CASE(twins_of_every_length), CASE(twins_long),
          CASE(twins_extreme), CASE(ends_of_memory), CASE(special_values),
          CASE(bad_rows_show), CASE(statistics_of_a_row), CASE(online_softmax), CASE(rotation),
          CASE(adam_formula), CASE(adam_by_hand), CASE(adam_forgets), CASE(sum_of_squares),
          CASE(draw_distribution), CASE(draw_edges), CASE(every_piece_once),
          CASE(nothing_of_a_job_that_is_over), CASE(last_of_a_share))
