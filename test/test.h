/* The test runner: one program per subject, which includes "../rlhf.c" and then this file.
 *
 *     #include "../rlhf.c"
 *     #include "test.h"
 *
 *     TEST(sums_add_up) { CHECK_EQ_I(1 + 1, 2); }
 *
 *     TEST_MAIN(CASE(sums_add_up))
 *
 * The program takes a part of a name as a filter, --list, and --seed N, which replays the numbers
 * that random tests draw. It closes with "N passed, N failed, N skipped"; the exit status is 1 if
 * a test failed. Contexts opened with test_hooks() count what they allocate: a test that leaves
 * blocks behind, frees one twice, or writes past its end has failed. */

#ifndef RLHF_TEST_H
#define RLHF_TEST_H

#include "../rlhf.h"

#include <dirent.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef struct test_case {
    const char *name;
    void (*run)(void);
} test_case;

#define TEST(name) static void case_##name(void)
#define CASE(name) {#name, case_##name}
#define TEST_MAIN(...)                                                                             \
    static const test_case test_cases[] = {__VA_ARGS__};                                           \
    int main(int argc, char **argv) {                                                              \
        return test_main(argc, argv, test_cases, sizeof test_cases / sizeof *test_cases);          \
    }

/* What belongs to the test that runs now. */
static const char *test_name;
static int test_failures;        /* failed checks */
static const char *test_skipped; /* why, or null */
static uint64_t test_seed = 1;
static uint64_t test_state;       /* of test_u64 */
static char test_dir_path[512];   /* "" until test_dir is called */
static const int test_shown = 10; /* failed checks that are printed; a broken loop has thousands */

/* ---- Checks ---------------------------------------------------------------------------------- */

/* A failed CHECK is noted and the test goes on; a failed REQUIRE ends it, for what would crash the
 * rest. REQUIRE and SKIP return, so they stand in functions of type void. */
#define CHECK(cond) ((cond) ? (void)0 : test_fail(__FILE__, __LINE__, "%s", #cond))
#define REQUIRE(cond)                                                                              \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            test_fail(__FILE__, __LINE__, "%s", #cond);                                            \
            return;                                                                                \
        }                                                                                          \
    } while (0)
#define CHECK_EQ_I(a, b) test_eq_i(__FILE__, __LINE__, #a, #b, (int64_t)(a), (int64_t)(b))
#define CHECK_EQ_S(a, b) test_eq_s(__FILE__, __LINE__, #a, #b, (a), (b))
#define CHECK_NEAR(a, b, tol)                                                                      \
    test_near(__FILE__, __LINE__, #a, #b, (double)(a), (double)(b), (double)(tol))

/* The same bits in n floats: no tolerance, -0 differs from 0, and one NaN from another. */
#define CHECK_BITS(a, b, n) test_bits(__FILE__, __LINE__, #a, #b, (a), (b), (size_t)(n))

#define SKIP(reason)                                                                               \
    do {                                                                                           \
        test_skipped = (reason);                                                                   \
        return;                                                                                    \
    } while (0)

__attribute__((format(printf, 3, 4))) static void test_fail(const char *file, int line,
                                                            const char *format, ...) {
    if (test_failures++ >= test_shown) return;
    va_list args;
    va_start(args, format);
    printf("\n    %s:%d: ", file, line);
    vprintf(format, args);
    if (test_failures == test_shown) printf("\n    (the test's further failures are not shown)");
    va_end(args);
}

static void test_eq_i(const char *file, int line, const char *a, const char *b, int64_t x,
                      int64_t y) {
    if (x != y) test_fail(file, line, "%s = %" PRId64 ", but %s = %" PRId64, a, x, b, y);
}

static void test_eq_s(const char *file, int line, const char *a, const char *b, const char *x,
                      const char *y) {
    if (x == y || (x && y && strcmp(x, y) == 0)) return;
    test_fail(file, line, "%s = \"%s\", but %s = \"%s\"", a, x ? x : "(null)", b,
              y ? y : "(null)");
}

/* Written so that a NaN on either side fails; equal infinities pass. */
static void test_near(const char *file, int line, const char *a, const char *b, double x, double y,
                      double tol) {
    if (x == y || fabs(x - y) <= tol) return;
    test_fail(file, line, "%s = %.9g, but %s = %.9g (off by %.3g, allowed %.3g)", a, x, b, y,
              fabs(x - y), tol);
}

static void test_bits(const char *file, int line, const char *a, const char *b, const float *x,
                      const float *y, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t p, q;
        memcpy(&p, x + i, sizeof p);
        memcpy(&q, y + i, sizeof q);
        if (p == q) continue;
        test_fail(file, line, "%s[%zu] = %.9g (%08" PRIx32 "), but %s[%zu] = %.9g (%08" PRIx32 ")",
                  a, i, (double)x[i], p, b, i, (double)y[i], q);
        return;
    }
}

/* ---- Numbers --------------------------------------------------------------------------------- */

/* Each test draws from its own sequence, so a filter does not change what it sees. */
static uint64_t test_u64(void) {
    uint64_t z = (test_state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* A whole number in [low, high]. */
static int64_t test_int(int64_t low, int64_t high) {
    return low + (int64_t)(test_u64() % (uint64_t)(high - low + 1));
}

/* A number in [low, high). */
static float test_float(float low, float high) {
    return low + (high - low) * ((float)(test_u64() >> 40) * 0x1p-24f);
}

static void test_fill(float *x, size_t n, float low, float high) {
    for (size_t i = 0; i < n; i++) x[i] = test_float(low, high);
}

/* Whether only the quick part is wanted: under sanitizers and emulators. */
static bool test_quick(void) {
    const char *value = getenv("RLHF_TEST_QUICK");
    return value && *value && strcmp(value, "0") != 0;
}

/* ---- Memory ---------------------------------------------------------------------------------- */

/* Before each block lies this header, after it a fence of the same word. Fresh memory is filled
 * with 0xFF, a NaN in every float format, so that reading before writing shows. */
typedef struct test_block {
    _Alignas(64) uint64_t fence;
    size_t size;
} test_block;

#define TEST_FENCE 0xFE9CEFE9CEFE9CEFu

static atomic_int_fast64_t test_live_blocks, test_live_bytes, test_calls;
static atomic_int_fast64_t test_fail_call; /* the call that fails; 0 for none */
static atomic_bool test_call_failed;
static atomic_int test_bad_frees;

static void *test_alloc(void *user, size_t size) {
    (void)user;
    int64_t call = atomic_fetch_add(&test_calls, 1) + 1;
    if (call == atomic_load(&test_fail_call)) {
        atomic_store(&test_call_failed, true);
        return NULL;
    }
    if (size > SIZE_MAX - 2 * sizeof(test_block)) return NULL;
    size_t whole = sizeof(test_block) + size + sizeof(uint64_t);
    test_block *block = aligned_alloc(64, (whole + 63) / 64 * 64);
    if (!block) return NULL;
    block->fence = TEST_FENCE;
    block->size = size;
    memset(block + 1, 0xFF, size);
    memcpy((char *)(block + 1) + size, &block->fence, sizeof block->fence);
    atomic_fetch_add(&test_live_blocks, 1);
    atomic_fetch_add(&test_live_bytes, (int64_t)size);
    return block + 1;
}

/* A bad free is printed here and counted against the test; the block then stays where it is. */
static void test_free(void *user, void *ptr, size_t size) {
    (void)user;
    if (!ptr) return;
    test_block *block = (test_block *)ptr - 1;
    uint64_t after;
    const char *wrong = NULL;
    if (block->fence != TEST_FENCE) wrong = "not a live block, or written before its start";
    else if (block->size != size) wrong = "freed with another size than it was allocated with";
    else if (memcpy(&after, (char *)ptr + size, sizeof after), after != TEST_FENCE)
        wrong = "written past its end";
    if (wrong) {
        atomic_fetch_add(&test_bad_frees, 1);
        printf("\n    block of %zu bytes: %s", size, wrong);
        return;
    }
    block->fence = 0;
    atomic_fetch_sub(&test_live_blocks, 1);
    atomic_fetch_sub(&test_live_bytes, (int64_t)size);
    free(block);
}

static rlhf_hooks test_hooks(void) {
    rlhf_hooks hooks;
    memset(&hooks, 0, sizeof hooks);
    hooks.alloc = test_alloc;
    hooks.free = test_free;
    return hooks;
}

/* Blocks that test_hooks() contexts hold now. */
static int64_t test_live(void) {
    return atomic_load(&test_live_blocks);
}

/* The n-th allocation from here on fails, once; 0: none. */
static void test_fail_at(int64_t n) {
    atomic_store(&test_call_failed, false);
    atomic_store(&test_fail_call, n ? atomic_load(&test_calls) + n : 0);
}

/* Drives a loop in which the 1st, 2nd, 3rd, ... allocation fails, until a round needs no more:
 *
 *     for (int64_t n = 0; test_next_oom(&n);) { ... expect success or RLHF_ERR_MEMORY ... }
 */
static bool test_next_oom(int64_t *n) {
    bool again = *n == 0 || atomic_load(&test_call_failed);
    test_fail_at(again ? ++*n : 0);
    return again;
}

/* ---- Files ----------------------------------------------------------------------------------- */

static void test_remove(const char *path) {
    DIR *dir = opendir(path);
    if (dir) {
        for (struct dirent *entry; (entry = readdir(dir));) {
            char child[1024];
            if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
            int n = snprintf(child, sizeof child, "%s/%s", path, entry->d_name);
            struct stat info;
            if (n < 0 || n >= (int)sizeof child || lstat(child, &info) != 0) continue;
            if (S_ISDIR(info.st_mode)) test_remove(child);
            else unlink(child);
        }
        closedir(dir);
    }
    rmdir(path);
}

/* An empty directory of the running test, removed when it passes and kept when it fails. */
static const char *test_dir(void) {
    if (!*test_dir_path) {
        const char *base = getenv("TMPDIR");
        snprintf(test_dir_path, sizeof test_dir_path, "%s/rlhf-%s-XXXXXX",
                 base && *base ? base : "/tmp", test_name);
        if (!mkdtemp(test_dir_path))
            test_fail(__FILE__, __LINE__, "cannot make the directory %s", test_dir_path);
    }
    return test_dir_path;
}

/* "name" in the test's directory. The last four results stay valid. */
static const char *test_path(const char *name) {
    static char paths[4][1024];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", test_dir(), name);
    return path;
}

/* Writes a text file into the test's directory; its path is valid as test_path's is. */
static const char *test_write(const char *name, const char *text) {
    const char *path = test_path(name);
    FILE *file = fopen(path, "wb");
    if (!file || fputs(text, file) < 0) test_fail(__FILE__, __LINE__, "cannot write %s", path);
    if (file) fclose(file);
    return path;
}

/* A model, tokenizer or dataset of the shared assets, which not every checkout has beside it: null
 * if it is not there. The last four results stay valid. */
static const char *test_asset(const char *name) {
    static char paths[4][1024];
    static int next;
    char *path = paths[next++ % 4];
    const char *base = getenv("RLHF_TEST_ASSETS");
    snprintf(path, sizeof paths[0], "%s/%s", base && *base ? base : "../shared/assets", name);
    return access(path, R_OK) == 0 ? path : NULL;
}

/* ---- Inside the library ---------------------------------------------------------------------- */

/* For tests that include rlhf.c, which throws errors instead of returning them. */
#ifdef RLHF_INLINE

/* A context with the kernels called isa ("auto" for the best ones), whose memory is counted. */
static rlhf_ctx *test_context(const char *isa, int threads) {
    rlhf_options options = rlhf_options_default();
    rlhf_ctx *ctx = NULL;
    options.isa = isa;
    options.threads = threads;
    options.hooks = test_hooks();
    if (rlhf_open(&ctx, &options) != RLHF_OK)
        test_fail(__FILE__, __LINE__, "cannot open a context with isa %s", isa);
    return ctx;
}

/* A call that is expected to succeed; its own text otherwise. */
#define OK(ctx, call)                                                                              \
    do {                                                                                           \
        rlhf_status ok_status_ = (call);                                                           \
        if (ok_status_ != RLHF_OK)                                                                 \
            test_fail(__FILE__, __LINE__, "%s: %s (%s)", #call, rlhf_status_text(ok_status_),      \
                      rlhf_error(ctx));                                                            \
    } while (0)

/* Calls run(ctx, arg) as a public call does: what it throws becomes the status. */
static rlhf_status test_call(rlhf_ctx *ctx, void (*run)(rlhf_ctx *, void *), void *arg) {
    err_frame frame;
    mem_enter(ctx, &frame);
    if (setjmp(frame.jump)) return mem_leave(ctx, 1);
    run(ctx, arg);
    return mem_leave(ctx, 0);
}

#endif

/* ---- Floats with margins --------------------------------------------------------------------- */

/* n floats, not even aligned to 8 bytes, between margins of a NaN with a mark in it; they are that
 * NaN too. Who reads a margin computes NaN, who writes one is found by test_margins. */
enum { TEST_MARGIN = 67 };
static const uint32_t test_poison = 0x7fc5a5a5;

static float *test_floats(size_t n) {
    float *base = malloc((n + 2 * TEST_MARGIN) * sizeof *base);
    for (size_t i = 0; base && i < n + 2 * TEST_MARGIN; i++)
        memcpy(base + i, &test_poison, sizeof *base);
    return base + TEST_MARGIN;
}

static bool test_poisoned(const float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (memcmp(x + i, &test_poison, sizeof *x)) return false;
    return true;
}

static bool test_margins(const float *x, size_t n) {
    return test_poisoned(x - TEST_MARGIN, TEST_MARGIN) && test_poisoned(x + n, TEST_MARGIN);
}

static void test_floats_free(float *x) {
    if (x) free(x - TEST_MARGIN);
}

/* ---- Runner ---------------------------------------------------------------------------------- */

/* Seconds after which a test is taken to hang: its program dies, and what it printed says where. */
enum { TEST_HANGS = 3600 };

static double test_now(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Runs one test and what has to hold after each. A failed test may leave memory: that it did is no
 * second finding. */
static void test_run(const test_case *test) {
    test_name = test->name;
    test_failures = 0;
    test_skipped = NULL;
    test_state = test_seed;
    for (const char *c = test->name; *c; c++) test_state = test_state * 31 + (unsigned char)*c;
    atomic_store(&test_live_blocks, 0);
    atomic_store(&test_live_bytes, 0);
    atomic_store(&test_bad_frees, 0);
    test_fail_at(0);

    double began = test_now();
    printf("  %-40s", test->name);
    fflush(stdout);
    alarm(TEST_HANGS);
    test->run();
    alarm(0);
    test_failures += atomic_load(&test_bad_frees);
    if (!test_failures && test_live() != 0)
        test_fail(__FILE__, __LINE__, "%" PRId64 " blocks (%" PRId64 " bytes) were never freed",
                  test_live(), (int64_t)atomic_load(&test_live_bytes));

    if (*test_dir_path && !test_failures) test_remove(test_dir_path);
    else if (*test_dir_path) printf("\n    its files are in %s", test_dir_path);
    *test_dir_path = '\0';
    if (test_failures) printf("\n  %-40s FAILED", test->name);
    else if (test_skipped) printf(" skipped: %s", test_skipped);
    else printf(" ok");
    double took = test_now() - began;
    if (took >= 0.1) printf("  %.1f s", took);
    printf("\n");
    fflush(stdout);
}

static int test_main(int argc, char **argv, const test_case *tests, size_t count) {
    const char *filter = "";
    bool list = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--list") == 0) list = true;
        else if (strcmp(argv[i], "--seed") == 0 && argv[i + 1])
            test_seed = strtoull(argv[++i], NULL, 0);
        else if (argv[i][0] != '-') filter = argv[i];
        else {
            fprintf(stderr, "usage: %s [NAME] [--list] [--seed N]\n", argv[0]);
            return 2;
        }
    }

    int passed = 0, failed = 0, skipped = 0;
    if (!list) printf("  seed %" PRIu64 "\n", test_seed);
    for (size_t i = 0; i < count; i++) {
        if (!strstr(tests[i].name, filter)) continue;
        if (list) {
            puts(tests[i].name);
            continue;
        }
        test_run(tests + i);
        if (test_failures) failed++;
        else if (test_skipped) skipped++;
        else passed++;
    }
    if (!list) printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
    return failed > 0;
}

#endif
