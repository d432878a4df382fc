/* The matrix products of `rlhf bench gemm` through a library of products.
 *
 *     gemm_peer [--threads N] [--quick] gemm/forward/256x768x3072 gemm/dX/256x768x3072 ...
 *     gemm_peer --check
 *
 * Built once for each library, with one of
 *
 *     -DPEER_OPENBLAS  cblas_sgemm
 *     -DPEER_BLIS      cblas_sgemm
 *     -DPEER_ONEDNN    forward: matmul with weights packed once; dX, dW: dnnl_sgemm; names that end
 *                      in /bf16: matmul of bf16 with sums in f32, forward packed likewise
 *
 * A name is gemm/WHAT/MxKxN, with /f32 or /bf16 behind it or neither: M tokens through a layer of N
 * outputs and K inputs, X [M][K], W [N][K], Y [M][N].
 *
 *     forward  Y  = X W^T
 *     dX       dX = dY W
 *     dW       dW = dW + dY^T X
 *
 * The last line of standard output is a JSON object with the results. */

#define _GNU_SOURCE
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

typedef enum { FORWARD, DX, DW } product;

/* One product and its operands. The library's own state hangs on lib. */
typedef struct work {
    product what;
    int m, k, n, bf16;
    float *x, *w, *y;
    void *lib;
} work;

static void fail(const char *text) {
    fprintf(stderr, "gemm_peer: %s\n", text);
    exit(1);
}

/* Big arrays on big pages, as rlhf has them. */
static float *floats(size_t n) {
    size_t page = (size_t)2 << 20, size = (n * sizeof(float) + page - 1) / page * page;
    void *p = NULL;
    if (posix_memalign(&p, page, size)) fail("out of memory");
#ifdef MADV_HUGEPAGE
    madvise(p, size, MADV_HUGEPAGE);
#endif
    return p;
}

/* ---- The libraries ----
 * lib_begin; peer_name; lib_threads; lib_open makes what is made once, and says whether the library
 * has the product; lib_run is one call; lib_result brings the product into floats, for the check;
 * lib_close. */

#if defined PEER_OPENBLAS || defined PEER_BLIS

#ifdef PEER_BLIS
#include <blis.h>

/* Where a hypervisor hides the model's name, BLIS takes an Intel processor with AVX-512 for a
 * Haswell: a user who looks at the speed sets this. */
static void lib_begin(void) {
#ifdef __x86_64__
    char id[16];
    snprintf(id, sizeof id, "%d", (int)BLIS_ARCH_SKX);
    if (__builtin_cpu_is("intel") && __builtin_cpu_supports("avx512f"))
        setenv("BLIS_ARCH_TYPE", id, 0);
#endif
    bli_init();
}

static void peer_name(char *to, size_t size) {
    snprintf(to, size, "blis %s %s", bli_info_get_version_str(),
             bli_arch_string(bli_arch_query_id()));
}

static void lib_threads(int n) { bli_thread_set_num_threads(n); }
#else
#include <cblas.h>

static void lib_begin(void) {}

static void peer_name(char *to, size_t size) {
    char version[32] = "";
    sscanf(openblas_get_config(), "OpenBLAS %31s", version);
    snprintf(to, size, "openblas %s %s", version, openblas_get_corename());
}

static void lib_threads(int n) { openblas_set_num_threads(n); }
#endif

static int lib_open(work *g) { return !g->bf16; }

static void lib_run(void *arg) {
    const work *g = arg;
    int m = g->m, k = g->k, n = g->n;
    if (g->what == FORWARD)
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, n, k, 1, g->x, k, g->w, k, 0, g->y,
                    n);
    if (g->what == DX)
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, k, n, 1, g->y, n, g->w, k, 0,
                    g->x, k);
    if (g->what == DW)
        cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, n, k, m, 1, g->y, n, g->x, k, 1, g->w,
                    k);
}

static const float *lib_result(const work *g) {
    return g->what == FORWARD ? g->y : g->what == DX ? g->x : g->w;
}

static void lib_close(work *g) { (void)g; }

#elif defined PEER_ONEDNN

#include <dnnl.h>
#include <omp.h>

static void try(dnnl_status_t status) {
    if (status != dnnl_success) fail("oneDNN failed");
}

static void lib_begin(void) {}

/* With AMX, products of bf16 come from another unit than vdpbf16ps, so the name says it. */
static void peer_name(char *to, size_t size) {
    const dnnl_version_t *v = dnnl_version();
    int isa = (int)dnnl_get_effective_cpu_isa(), amx = (int)dnnl_cpu_isa_avx512_core_amx;
    snprintf(to, size, "onednn %d.%d.%d%s", v->major, v->minor, v->patch,
             (isa & amx) == amx ? " amx" : "");
}

static void lib_threads(int n) { omp_set_num_threads(n); }

/* Version 3 made descriptions opaque and does without operation descriptions. */
#if DNNL_VERSION_MAJOR >= 3
typedef dnnl_memory_desc_t mem_desc;
typedef const_dnnl_memory_desc_t mem_view;
#define VIEW(d) (d)
#else
typedef dnnl_memory_desc_t mem_desc;
typedef const dnnl_memory_desc_t *mem_view;
#define VIEW(d) (&(d))
#endif

static mem_desc describe(int rows, int cols, int bf16, dnnl_format_tag_t tag) {
    mem_desc d;
    dnnl_dims_t dims = {rows, cols};
    dnnl_data_type_t type = bf16 ? dnnl_bf16 : dnnl_f32;
#if DNNL_VERSION_MAJOR >= 3
    try(dnnl_memory_desc_create_with_tag(&d, 2, dims, type, tag));
#else
    try(dnnl_memory_desc_init_by_tag(&d, 2, dims, type, tag));
#endif
    return d;
}

/* 0 where the library has no such product for this machine. */
static int plan(dnnl_primitive_desc_t *to, dnnl_engine_t engine, mem_desc a, mem_desc b, mem_desc c,
                int add) {
    dnnl_primitive_attr_t attr;
    dnnl_post_ops_t ops;
    try(dnnl_primitive_attr_create(&attr));
    try(dnnl_post_ops_create(&ops));
#if DNNL_VERSION_MAJOR >= 3
    if (add) try(dnnl_post_ops_append_sum(ops, 1, 0, dnnl_f32));
    try(dnnl_primitive_attr_set_post_ops(attr, ops));
    int ok = dnnl_matmul_primitive_desc_create(to, engine, a, b, NULL, c, attr) == dnnl_success;
#else
    dnnl_matmul_desc_t d;
    if (add) try(dnnl_post_ops_append_sum(ops, 1));
    try(dnnl_primitive_attr_set_post_ops(attr, ops));
    try(dnnl_matmul_desc_init(&d, &a, &b, NULL, &c));
    int ok = dnnl_primitive_desc_create(to, &d, attr, engine, NULL) == dnnl_success;
#endif
    dnnl_post_ops_destroy(ops);
    dnnl_primitive_attr_destroy(attr);
    return ok;
}

/* A planned product C = A B and the three memories it works on. */
typedef struct matmul {
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    dnnl_primitive_t run;
    dnnl_memory_t mem[3];
    float *sums; /* C where the operand in its place is bf16 */
} matmul;

static dnnl_memory_t hold(const matmul *l, mem_view d, void *data) {
    dnnl_memory_t m;
    try(dnnl_memory_create(&m, d, l->engine, data));
    return m;
}

/* Moves data into another layout or type. */
static void reorder(const matmul *l, mem_view from, dnnl_memory_t a, mem_view to, dnnl_memory_t b) {
    dnnl_primitive_desc_t pd;
    dnnl_primitive_t p;
    dnnl_exec_arg_t args[] = {{DNNL_ARG_FROM, a}, {DNNL_ARG_TO, b}};
    try(dnnl_reorder_primitive_desc_create(&pd, from, l->engine, to, l->engine, NULL));
    try(dnnl_primitive_create(&p, pd));
    try(dnnl_primitive_execute(p, l->stream, 2, args));
    try(dnnl_stream_wait(l->stream));
    dnnl_primitive_destroy(p);
    dnnl_primitive_desc_destroy(pd);
}

/* An operand as the product wants it: the floats themselves, or a copy in its own layout. */
static dnnl_memory_t operand(const matmul *l, mem_desc plain, float *data, mem_view want) {
    dnnl_memory_t from = hold(l, VIEW(plain), data);
    if (dnnl_memory_desc_equal(VIEW(plain), want)) return from;
    dnnl_memory_t to = hold(l, want, DNNL_MEMORY_ALLOCATE);
    reorder(l, VIEW(plain), from, want, to);
    dnnl_memory_destroy(from);
    return to;
}

/* What is not a matmul here is dnnl_sgemm: without lib. */
static int lib_open(work *g) {
    if (!g->bf16 && g->what != FORWARD) return 1;
    int rows = g->what == DW ? g->n : g->m, cols = g->what == FORWARD ? g->n : g->k,
        sums = g->what == FORWARD ? g->k
               : g->what == DX    ? g->n
                                  : g->m;
    float *a = g->what == FORWARD ? g->x : g->y, *b = g->what == DW ? g->x : g->w;
    dnnl_format_tag_t ta = g->what == DW ? dnnl_ba : dnnl_ab,
                      tb = g->what == FORWARD ? dnnl_ba : dnnl_ab;
    matmul *l = calloc(1, sizeof *l);
    if (!l) fail("out of memory");
    g->lib = l;
    try(dnnl_engine_create(&l->engine, dnnl_cpu, 0));
    try(dnnl_stream_create(&l->stream, l->engine, dnnl_stream_default_flags));
    l->sums = floats((size_t)rows * (size_t)cols);
    memset(l->sums, 0, (size_t)rows * (size_t)cols * sizeof(float));
    mem_desc c = describe(rows, cols, 0, dnnl_ab);
    dnnl_primitive_desc_t pd;
    /* The library chooses the layout of weights that stay. */
    if (!plan(&pd, l->engine, describe(rows, sums, g->bf16, ta),
              describe(sums, cols, g->bf16, g->what == FORWARD ? dnnl_format_tag_any : tb), c,
              g->what == DW))
        return 0;
    try(dnnl_primitive_create(&l->run, pd));
    l->mem[0] = operand(l, describe(rows, sums, 0, ta), a,
                        dnnl_primitive_desc_query_md(pd, dnnl_query_src_md, 0));
    l->mem[1] = operand(l, describe(sums, cols, 0, tb), b,
                        dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0));
    l->mem[2] = hold(l, VIEW(c), l->sums);
    dnnl_primitive_desc_destroy(pd);
    return 1;
}

static void lib_run(void *arg) {
    const work *g = arg;
    const matmul *l = g->lib;
    if (l) {
        dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, l->mem[0]},
                                  {DNNL_ARG_WEIGHTS, l->mem[1]},
                                  {DNNL_ARG_DST, l->mem[2]}};
        try(dnnl_primitive_execute(l->run, l->stream, 3, args));
        try(dnnl_stream_wait(l->stream));
    } else if (g->what == DX)
        try(dnnl_sgemm('N', 'N', g->m, g->k, g->n, 1, g->y, g->n, g->w, g->k, 0, g->x, g->k));
    else try(dnnl_sgemm('T', 'N', g->n, g->k, g->m, 1, g->y, g->n, g->x, g->k, 1, g->w, g->k));
}

static const float *lib_result(const work *g) {
    const matmul *l = g->lib;
    return l ? l->sums : g->what == DX ? g->x : g->w;
}

static void lib_close(work *g) {
    matmul *l = g->lib;
    if (!l) return;
    for (int i = 0; i < 3; i++)
        if (l->mem[i]) dnnl_memory_destroy(l->mem[i]);
    if (l->run) dnnl_primitive_destroy(l->run);
    dnnl_stream_destroy(l->stream);
    dnnl_engine_destroy(l->engine);
    free(l->sums);
    free(l);
}

#else
#error "one of -DPEER_OPENBLAS, -DPEER_BLIS, -DPEER_ONEDNN"
#endif

/* ---- The work ---- */

/* Reads a name; 0 if it is not one of a product. */
static int parse(const char *name, work *g) {
    char what[8], type[8] = "f32";
    int used = 0;
    memset(g, 0, sizeof *g);
    if (sscanf(name, "gemm/%7[^/]/%dx%dx%d%n", what, &g->m, &g->k, &g->n, &used) != 4) return 0;
    if (name[used] && sscanf(name + used, "/%7s", type) != 1) return 0;
    if (strcmp(type, "f32") && strcmp(type, "bf16")) return 0;
    g->bf16 = !strcmp(type, "bf16");
    g->what = !strcmp(what, "forward") ? FORWARD : !strcmp(what, "dX") ? DX : DW;
    return (g->what != DW || !strcmp(what, "dW")) && g->m > 0 && g->k > 0 && g->n > 0;
}

static float *fill(size_t n, uint32_t seed, float scale) {
    float *p = floats(n);
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        p[i] = scale * ((float)(seed >> 8) / (1 << 24) - 0.5f);
    }
    return p;
}

/* Allocates the operands; 0 if the library does not have the product. */
static int begin(work *g) {
    size_t m = (size_t)g->m, k = (size_t)g->k, n = (size_t)g->n;
    g->x = fill(m * k, 1, 1);
    g->y = fill(m * n, 2, 1);
    g->w = fill(n * k, 3, g->what == DW ? 0 : 1);
    return lib_open(g);
}

static void end(work *g) {
    lib_close(g);
    free(g->x);
    free(g->y);
    free(g->w);
}

/* ---- Measuring: as `rlhf bench` does ---- */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int less(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Median seconds of a call after one that does not count: at least three, about a second. */
static double median_time(work *g, int quick) {
    double t[64], begun;
    int n = 0;
    lib_run(g);
    begun = now();
    while (n < 64 && (n < (quick ? 2 : 3) || now() - begun < (quick ? 0.3 : 1.0))) {
        double at = now();
        lib_run(g);
        t[n++] = now() - at;
    }
    qsort(t, (size_t)n, sizeof *t, less);
    return 0.5 * (t[n / 2] + t[(n - 1) / 2]);
}

static void forget_peak(void) {
    FILE *f = fopen("/proc/self/clear_refs", "w");
    if (!f) return;
    fputs("5", f);
    fclose(f);
}

static double peak_mb(void) {
    double kb = 0;
    FILE *f = fopen("/proc/self/status", "r");
    for (char line[256]; f && fgets(line, sizeof line, f);)
        if (sscanf(line, "VmHWM: %lf", &kb) == 1) break;
    if (f) fclose(f);
    return kb / 1024;
}

/* ---- Checking ---- */

/* One element of the product, in double. */
static double element(const work *g, const float *x, const float *w, const float *y, int i, int j) {
    double s = 0;
    if (g->what == FORWARD)
        for (int p = 0; p < g->k; p++) s += (double)x[i * g->k + p] * w[j * g->k + p];
    if (g->what == DX)
        for (int p = 0; p < g->n; p++) s += (double)y[i * g->n + p] * w[p * g->k + j];
    if (g->what == DW)
        for (int p = 0; p < g->m; p++) s += (double)y[p * g->n + i] * x[p * g->k + j];
    return s;
}

/* Every element of one product against plain sums; dW is called twice and adds. */
static int check_one(const char *name) {
    work g;
    if (!parse(name, &g)) fail("a bad name");
    if (!begin(&g)) {
        printf("none   %s\n", name);
        end(&g);
        return 0;
    }
    size_t m = (size_t)g.m, k = (size_t)g.k, n = (size_t)g.n;
    float *x = fill(m * k, 1, 1), *y = fill(m * n, 2, 1), *w = fill(n * k, 3, 1);
    int rows = g.what == DW ? g.n : g.m, cols = g.what == FORWARD ? g.n : g.k, calls = 2;
    for (int i = 0; i < calls; i++) lib_run(&g);
    const float *got = lib_result(&g);
    double worst = 0;
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++) {
            double want = element(&g, x, w, y, i, j) * (g.what == DW ? calls : 1);
            worst = fmax(worst, fabs(want - (double)got[(size_t)i * (size_t)cols + (size_t)j]));
        }
    int ok = worst < (g.bf16 ? 0.05 : 1e-4);
    printf("%s %s: off by at most %.1e\n", ok ? "ok    " : "FAILED", name, worst);
    end(&g);
    free(x);
    free(y);
    free(w);
    return !ok;
}

static int check(void) {
    static const char *const what[] = {"forward", "dX", "dW"}, *const type[] = {"", "/bf16"};
    static const int sizes[][3] = {{1, 96, 64}, {8, 33, 50}, {65, 128, 127}};
    int failed = 0;
    for (int t = 0; t < 2; t++)
        for (int w = 0; w < 3; w++)
            for (int s = 0; s < 3; s++) {
                char name[64];
                snprintf(name, sizeof name, "gemm/%s/%dx%dx%d%s", what[w], sizes[s][0], sizes[s][1],
                         sizes[s][2], type[t]);
                failed += check_one(name);
            }
    return failed > 0;
}

/* ---- main ---- */

int main(int argc, char **argv) {
    int quick = 0, checks = 0, threads = 0, first = 1; /* threads 0: as the library likes */
    char peer[96];
    lib_begin();
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], "--quick")) quick = 1;
        else if (!strcmp(argv[i], "--check")) checks = 1;
        else if (!strcmp(argv[i], "--threads") && i + 1 < argc) {
            threads = atoi(argv[++i]);
            if (threads < 1) fail("--threads: at least 1");
            lib_threads(threads);
        } else if (argv[i][0] == '-')
            fail("usage: gemm_peer [--threads N] [--quick] [--check] NAME...");
    if (checks) return check();
    peer_name(peer, sizeof peer);
    printf("{\"peer\": \"%s\", \"threads\": %d, \"results\": [", peer, threads);
    for (int i = 1; i < argc; i++) {
        work g;
        if (!parse(argv[i], &g)) continue;
        forget_peak();
        if (begin(&g)) {
            double flops = 2.0 * g.m * g.k * g.n, s = median_time(&g, quick);
            printf("%s{\"name\": \"%s\", \"value\": %.6g, \"unit\": \"GFLOP/s\", "
                   "\"peak_rss_mb\": %.1f}",
                   first ? "" : ", ", argv[i], flops / s / 1e9, peak_mb());
            first = 0;
        }
        end(&g);
    }
    printf("]}\n");
    return 0;
}
