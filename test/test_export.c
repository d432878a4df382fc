/* What other programs read (sections 16 and 21): GGUF files byte for byte, what is refused instead
 * of written wrong, and TensorBoard's event files. test/interop_gguf.py lets those programs read
 * them. */

#include "../rlhf.c"
#include "test.h"

/* ---- helpers --------------------------------------------------------------------------------- */

/* Configurations with "%s" for more members. */
static const char gpt2[] = "{\"model_type\":\"gpt2\",\"n_embd\":32,\"n_layer\":2,\"n_head\":4,"
                           "\"n_positions\":24,\"vocab_size\":300%s}";
static const char llama[] = "{\"model_type\":\"llama\",\"hidden_size\":32,\"num_hidden_layers\":2,"
                            "\"num_attention_heads\":4,\"num_key_value_heads\":2,"
                            "\"intermediate_size\":40,\"max_position_embeddings\":24,"
                            "\"vocab_size\":300,\"eos_token_id\":[7,9]%s}";
static const char slowed[] = ",\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":4.0,"
                             "\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,"
                             "\"original_max_position_embeddings\":16}";

/* A random model; `from`, if not null, becomes `to` in its configuration. */
static rlhf_model *model_make(rlhf_ctx *ctx, const char *format, const char *more, const char *from,
                              const char *to) {
    char text[1024], changed[2048];
    rlhf_model *m = NULL;
    snprintf(text, sizeof text, format, more);
    const char *at = from ? strstr(text, from) : NULL;
    snprintf(changed, sizeof changed, "%.*s%s%s", at ? (int)(at - text) : 0, text, at ? to : "",
             at ? at + strlen(from) : text);
    if (rlhf_model_init(ctx, test_write("config.json", changed), 0, -1, -1, 5, &m) != RLHF_OK)
        test_fail(__FILE__, __LINE__, "model: %s", rlhf_error(ctx));
    return m;
}

static rlhf_tokenizer *tok_make(rlhf_ctx *ctx) {
    static const char text[] = "the cat sat on the mat, the dog sat on the cat, the mat is mine";
    const char *texts[1] = {text};
    size_t lens[1] = {sizeof text - 1};
    rlhf_tokenizer *tok = NULL;
    if (rlhf_tokenizer_train(ctx, texts, lens, 1, 270, &tok) != RLHF_OK)
        test_fail(__FILE__, __LINE__, "tokenizer: %s", rlhf_error(ctx));
    return tok;
}

/* A SentencePiece-style tokenizer.json: <unk>, a token for each byte, then n texts. */
static const char *spm_write(const char *pieces, const char *merges, const char *more) {
    static char text[16384];
    int n = snprintf(text, sizeof text,
                     "{\"added_tokens\":[{\"id\":0,\"content\":\"<unk>\",\"special\":true}],"
                     "\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\","
                     "\"prepend\":\"\xE2\x96\x81\"},{\"type\":\"Replace\",\"pattern\":{\"String\":"
                     "\" \"},\"content\":\"\xE2\x96\x81\"}]},%s\"model\":{\"type\":\"BPE\","
                     "\"unk_token\":\"<unk>\",\"byte_fallback\":true,\"merges\":[%s],\"vocab\":{"
                     "\"<unk>\":0",
                     more, merges);
    for (int b = 0; b < 256; b++)
        n += snprintf(text + n, sizeof text - (size_t)n, ",\"<0x%02X>\":%d", b, b + 1);
    snprintf(text + n, sizeof text - (size_t)n, "%s}}}", pieces);
    return test_write("tokenizer.json", text);
}

static unsigned char *slurp(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    unsigned char *p = calloc(1, 1 << 22);
    *n = f ? fread(p, 1, 1 << 22, f) : 0;
    if (f) fclose(f);
    return p;
}

/* A file being read; a field beyond its end is 0. */
typedef struct reader {
    const unsigned char *p;
    size_t n, at;
} reader;

static uint64_t number(reader *r, int bytes) {
    uint64_t v = 0;
    for (int i = 0; i < bytes && r->at + (size_t)i < r->n; i++)
        v |= (uint64_t)r->p[r->at + (size_t)i] << 8 * i;
    r->at += (size_t)bytes;
    return v;
}

/* The last eight results stay valid. */
static const char *text(reader *r) {
    static char texts[8][256];
    static int next;
    char *to = texts[next++ % 8];
    size_t n = (size_t)number(r, 8), k = r->at > r->n || n > r->n - r->at ? 0 : n;
    snprintf(to, sizeof texts[0], "%.*s", (int)k, (const char *)r->p + (k ? r->at : 0));
    r->at += n;
    return to;
}

/* What the test wants to know of a file: its keys, and where a tensor lies. */
typedef struct gguf {
    unsigned char *p;
    size_t n, data;
    json_t *keys, *tensors; /* values; [type, offset, sizes...] */
} gguf;

static json_t *value(reader *r, uint64_t type) {
    float f;
    uint32_t bits;
    if (type == 8) return json_string(text(r));
    if (type == 9) {
        uint64_t of = number(r, 4), n = number(r, 8);
        json_t *list = json_array();
        for (uint64_t i = 0; i < n && r->at < r->n; i++) json_array_append_new(list, value(r, of));
        return list;
    }
    if (type == 7) return json_boolean(number(r, 1) != 0);
    bits = (uint32_t)number(r, 4);
    memcpy(&f, &bits, sizeof f);
    return type == 6 ? json_real((double)f) : json_integer((int32_t)bits);
}

static gguf gguf_open(const char *path) {
    gguf g = {.keys = json_object(), .tensors = json_object()};
    g.p = slurp(path, &g.n);
    reader r = {g.p, g.n, 4};
    CHECK(g.n > 24 && memcmp(g.p, "GGUF", 4) == 0);
    CHECK_EQ_I(number(&r, 4), 3);
    uint64_t tensors = number(&r, 8), keys = number(&r, 8);
    for (uint64_t i = 0; i < keys; i++) {
        char name[256];
        snprintf(name, sizeof name, "%s", text(&r));
        uint64_t type = number(&r, 4);
        json_object_set_new(g.keys, name, value(&r, type));
    }
    for (uint64_t i = 0; i < tensors; i++) {
        const char *name = text(&r);
        uint64_t dims = number(&r, 4), size[2] = {1, 1};
        for (uint64_t k = 0; k < dims && k < 2; k++) size[k] = number(&r, 8);
        uint64_t type = number(&r, 4), offset = number(&r, 8);
        CHECK_EQ_I(offset % 32, 0);
        json_object_set_new(g.tensors, name,
                            json_pack("[I,I,I,I]", (json_int_t)type, (json_int_t)offset,
                                      (json_int_t)size[0], (json_int_t)size[1]));
    }
    g.data = (r.at + 31) / 32 * 32;
    CHECK_EQ_I(json_object_size(g.tensors), tensors);
    CHECK_EQ_I(json_object_size(g.keys), keys);
    return g;
}

static void gguf_drop(gguf *g) {
    free(g->p);
    json_decref(g->keys);
    json_decref(g->tensors);
}

/* The key's value as compact JSON. The last two results stay valid. */
static const char *key(const gguf *g, const char *name) {
    static char texts[2][8192];
    static int next;
    char *to = texts[next++ % 2];
    memset(to, 0, sizeof texts[0]);
    json_dumpb(json_object_get(g->keys, name), to, sizeof texts[0] - 1,
               JSON_COMPACT | JSON_ENCODE_ANY | JSON_REAL_PRECISION(6));
    return to;
}

/* The bytes of a tensor of the type and sizes. */
static const unsigned char *tensor(int line, const gguf *g, const char *name, int type, int cols,
                                   int rows) {
    const json_t *t = json_object_get(g->tensors, name);
    int64_t want[] = {type, -1, cols, rows};
    for (size_t i = 0; i < 4; i++) {
        int64_t got = json_integer_value(json_array_get(t, i));
        if (i != 1 && got != want[i])
            test_fail(__FILE__, line, "%s: entry %zu is %lld, expected %lld", name, i,
                      (long long)got, (long long)want[i]);
    }
    size_t at = g->data + (size_t)json_integer_value(json_array_get(t, 1));
    return at < g->n ? g->p + at : g->p;
}

#define TENSOR(g, name, type, cols, rows) tensor(__LINE__, g, name, type, cols, rows)

/* Rows of a float tensor are those of w, row r being its row from[r] (null: in order). */
static void check_rows(int line, const unsigned char *p, const float *w, int rows, int cols,
                       const int *from) {
    for (int r = 0; r < rows; r++)
        if (memcmp(p + (size_t)(r * cols) * 4, w + (from ? from[r] : r) * cols, (size_t)cols * 4))
            test_fail(__FILE__, line, "row %d differs", r);
}

/* ---- numbers --------------------------------------------------------------------------------- */

TEST(half_precision) {
    for (uint32_t h = 0; h < 0x10000; h++) {
        float f = v_ieee1((uint16_t)h);
        if (isnan(f)) CHECK((ckpt_to_half(f) & 0x7fff) > 0x7c00);
        else if (ckpt_to_half(f) != h)
            test_fail(__FILE__, __LINE__, "%04x: %04x", h, ckpt_to_half(f));
        /* Halfway to the next: the even one; a bit more or less: the nearer one. */
        if ((h & 0x7fff) >= 0x7bff) continue;
        float up = v_ieee1((uint16_t)(h + 1)), mid = 0.5f * (f + up);
        uint16_t even = (uint16_t)(h + (h & 1));
        if (ckpt_to_half(mid) != even || ckpt_to_half(nextafterf(mid, up)) != h + 1 ||
            ckpt_to_half(nextafterf(mid, f)) != h)
            test_fail(__FILE__, __LINE__, "around %04x", h);
    }
    CHECK_EQ_I(ckpt_to_half(65519.9961f), 0x7bff);
    CHECK_EQ_I(ckpt_to_half(65520.0f), 0x7c00);
    CHECK_EQ_I(ckpt_to_half(-1e30f), 0xfc00);
    CHECK_EQ_I(ckpt_to_half(0x1p-25f), 0);
    CHECK_EQ_I(ckpt_to_half(0x1.8p-25f), 1);
}

TEST(brain_floats) {
    for (uint32_t h = 0; h < 0x10000; h++) {
        float f = v_bits1((int32_t)(h << 16));
        if (isnan(f)) CHECK((v_half1(f) & 0x7fff) > 0x7f80);
        else CHECK_EQ_I(v_half1(f), h);
    }
    CHECK_EQ_I(v_half1(0x1.01p0f), 0x3f80); /* ties go to the even one */
    CHECK_EQ_I(v_half1(0x1.03p0f), 0x3f82);
    CHECK_EQ_I(v_half1(0x1.010002p0f), 0x3f81);
    CHECK_EQ_I(v_half1(v_bits1(0x7f800001)), 0x7fc0);
}

TEST(blocks) {
    float w[32] = {0};
    unsigned char out[34];
    memset(out, 9, sizeof out);
    CHECK_EQ_I(gguf_pack(&gguf_q8, w, 32, out), 1);
    for (int i = 0; i < 34; i++) CHECK_EQ_I(out[i], 0);
    for (int i = 0; i < 32; i++) w[i] = (float)(i - 16);
    w[3] = -127.0f;
    w[4] = 2.5f;
    w[5] = -2.5f;
    CHECK_EQ_I(gguf_pack(&gguf_q8, w, 32, out), 1);
    CHECK_EQ_I(out[0] | out[1] << 8, 0x3c00);
    for (int i = 0; i < 32; i++) /* halves go away from zero */
        CHECK_EQ_I((int8_t)out[2 + i], i == 3 ? -127 : i == 4 ? 3 : i == 5 ? -3 : i - 16);
    w[7] = NAN;
    CHECK_EQ_I(gguf_pack(&gguf_q8, w, 32, out), 0);
    w[7] = 1e9f;
    CHECK_EQ_I(gguf_pack(&gguf_q8, w, 32, out), 0);
    CHECK_EQ_I(gguf_pack(&gguf_f16, w, 32, (unsigned char[64]){0}), 0);
    CHECK_EQ_I(gguf_pack(&gguf_bf16, w, 32, (unsigned char[64]){0}), 1);
}

/* ---- files ----------------------------------------------------------------------------------- */

TEST(a_gpt2) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_model *m = model_make(ctx, gpt2, "", NULL, NULL);
    rlhf_tokenizer *tok = tok_make(ctx);
    OK(ctx, rlhf_model_save_gguf(m, tok, test_path("a.gguf"), "f32"));
    gguf g = gguf_open(test_path("a.gguf"));
    CHECK_EQ_S(key(&g, "general.architecture"), "\"gpt2\"");
    CHECK_EQ_S(key(&g, "general.file_type"), "0");
    CHECK_EQ_S(key(&g, "gpt2.context_length"), "24");
    CHECK_EQ_S(key(&g, "gpt2.block_count"), "2");
    CHECK_EQ_S(key(&g, "gpt2.embedding_length"), "32");
    CHECK_EQ_S(key(&g, "gpt2.feed_forward_length"), "128");
    CHECK_EQ_S(key(&g, "gpt2.attention.head_count"), "4");
    CHECK_EQ_S(key(&g, "gpt2.attention.layer_norm_epsilon"), "1e-5");
    CHECK_EQ_S(key(&g, "gpt2.rope.freq_base"), "");
    CHECK_EQ_S(key(&g, "tokenizer.ggml.model"), "\"gpt2\"");
    CHECK_EQ_S(key(&g, "tokenizer.ggml.pre"), "\"gpt-2\"");
    char last[16];
    int eos = rlhf_tokenizer_eos(tok);
    snprintf(last, sizeof last, "%d", eos);
    CHECK_EQ_S(key(&g, "tokenizer.ggml.eos_token_id"), last);
    CHECK_EQ_S(key(&g, "tokenizer.ggml.add_bos_token"), "false");
    CHECK_EQ_S(key(&g, "tokenizer.chat_template"), "");
    /* Every row of the model has a text; those without a token are unused. */
    const json_t *tokens = json_object_get(g.keys, "tokenizer.ggml.tokens");
    const json_t *types = json_object_get(g.keys, "tokenizer.ggml.token_type");
    CHECK_EQ_I(json_array_size(tokens), 300);
    CHECK_EQ_S(json_string_value(json_array_get(tokens, 0)), "!");
    CHECK_EQ_S(json_string_value(json_array_get(tokens, (size_t)eos)), "<|endoftext|>");
    CHECK_EQ_S(json_string_value(json_array_get(tokens, 299)), "[PAD299]");
    CHECK_EQ_I(json_integer_value(json_array_get(types, 0)), GGUF_NORMAL);
    CHECK_EQ_I(json_integer_value(json_array_get(types, (size_t)eos)), GGUF_CONTROL);
    CHECK_EQ_I(json_integer_value(json_array_get(types, 299)), GGUF_UNUSED);
    const json_t *merges = json_object_get(g.keys, "tokenizer.ggml.merges");
    CHECK_EQ_I(json_array_size(merges), eos - 256);
    CHECK(strchr(json_string_value(json_array_get(merges, 0)), ' ') != NULL);
    /* Matrices as the model has them, not as Conv1D has; no output matrix where it is tied. */
    check_rows(__LINE__, TENSOR(&g, "blk.1.attn_qkv.weight", 0, 32, 96), model_w(m, P_QKV_W, 1), 96,
               32, NULL);
    check_rows(__LINE__, TENSOR(&g, "blk.0.ffn_down.weight", 0, 128, 32), model_w(m, P_DOWN_W, 0),
               32, 128, NULL);
    check_rows(__LINE__, TENSOR(&g, "output_norm.bias", 0, 32, 1), model_w(m, P_LNF_B, 0), 1, 32,
               NULL);
    CHECK(!json_object_get(g.tensors, "output.weight"));
    CHECK_EQ_I(json_object_size(g.tensors), 2 + 2 * 12 + 2);
    gguf_drop(&g);
    rlhf_tokenizer_close(tok);
    rlhf_model_close(m);
    rlhf_close(ctx);
}

/* Rotated neighbours instead of halves: rows 0, hd/2, 1, hd/2 + 1, ... of each head. */
TEST(a_llama) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_model *m = model_make(ctx, llama, slowed, NULL, NULL);
    OK(ctx, rlhf_model_save_gguf(m, NULL, test_path("a.gguf"), "f32"));
    gguf g = gguf_open(test_path("a.gguf"));
    static const int order[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    int from[32];
    for (int r = 0; r < 32; r++) from[r] = r / 8 * 8 + order[r % 8];
    const float *qkv = model_w(m, P_QKV_W, 1);
    check_rows(__LINE__, TENSOR(&g, "blk.1.attn_q.weight", 0, 32, 32), qkv, 32, 32, from);
    check_rows(__LINE__, TENSOR(&g, "blk.1.attn_k.weight", 0, 32, 16), qkv + 32 * 32, 16, 32, from);
    check_rows(__LINE__, TENSOR(&g, "blk.1.attn_v.weight", 0, 32, 16), qkv + 48 * 32, 16, 32, NULL);
    check_rows(__LINE__, TENSOR(&g, "blk.0.ffn_gate.weight", 0, 32, 40), model_w(m, P_UP_W, 0), 40,
               32, NULL);
    check_rows(__LINE__, TENSOR(&g, "output.weight", 0, 32, 300), model_w(m, P_HEAD, 0), 300, 32,
               NULL);
    /* Waves of 2 pi, 63, 628, 6283 positions against 16: kept, and slowed by 4. */
    const unsigned char *p = TENSOR(&g, "rope_freqs.weight", 0, 4, 1);
    float factor[4];
    memcpy(factor, p, sizeof factor);
    CHECK_NEAR(factor[0], 1 / (0.25 * (1 - (16 / 6.2831853 - 1) / 3) + (16 / 6.2831853 - 1) / 3),
               1e-5);
    for (int i = 1; i < 4; i++) CHECK_NEAR(factor[i], 4, 0);
    CHECK_EQ_S(key(&g, "llama.attention.head_count_kv"), "2");
    CHECK_EQ_S(key(&g, "llama.attention.key_length"), "8");
    CHECK_EQ_S(key(&g, "llama.attention.layer_norm_rms_epsilon"), "1e-6");
    CHECK_EQ_S(key(&g, "llama.rope.freq_base"), "10000.0");
    CHECK_EQ_S(key(&g, "llama.vocab_size"), "300");
    CHECK_EQ_S(key(&g, "tokenizer.ggml.model"), "\"none\"");
    gguf_drop(&g);
    rlhf_model_close(m);
    /* The other kinds: matrices as asked, q8_0 where 32 divides the columns, norms exact. */
    static const struct {
        const char *type;
        int file, matrix, narrow;
    } kinds[] = {{"f16", 1, 1, 1}, {"bf16", 32, 30, 30}, {"q8_0", 7, 8, 1}};
    m = model_make(ctx, llama, "", "llama", "qwen2");
    for (size_t i = 0; i < 3; i++) {
        OK(ctx, rlhf_model_save_gguf(m, NULL, test_path("b.gguf"), kinds[i].type));
        g = gguf_open(test_path("b.gguf"));
        CHECK_EQ_I(json_integer_value(json_object_get(g.keys, "general.file_type")), kinds[i].file);
        TENSOR(&g, "token_embd.weight", kinds[i].matrix, 32, 300);
        TENSOR(&g, "blk.1.ffn_down.weight", kinds[i].narrow, 40, 32);
        TENSOR(&g, "blk.1.ffn_norm.weight", 0, 32, 1);
        TENSOR(&g, "blk.0.attn_k.bias", 0, 16, 1);
        CHECK_EQ_S(key(&g, "general.architecture"), "\"qwen2\"");
        gguf_drop(&g);
    }
    /* As they are: qwen2 rotates halves there, too. */
    OK(ctx, rlhf_model_save_gguf(m, NULL, test_path("b.gguf"), "f32"));
    g = gguf_open(test_path("b.gguf"));
    check_rows(__LINE__, TENSOR(&g, "blk.1.attn_q.weight", 0, 32, 32), model_w(m, P_QKV_W, 1), 32,
               32, NULL);
    gguf_drop(&g);
    rlhf_model_close(m);
    rlhf_close(ctx);
}

TEST(sentencepiece_tokenizers) {
    static const char pieces[] = ",\"\xE2\x96\x81\":257,\"a\":258,\"b\":259,\"ab\":260,"
                                 "\"\xE2\x96\x81"
                                 "ab\":261,\"\xE2\x96\x81"
                                 "a\":262";
    static const char merges[] = "\"\xE2\x96\x81 a\",\"a b\",\"\xE2\x96\x81"
                                 "a b\",\"\xE2\x96\x81 ab\"";
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_model *m = model_make(ctx, llama, "", NULL, NULL);
    rlhf_tokenizer *tok = NULL;
    OK(ctx, rlhf_tokenizer_open(ctx, spm_write(pieces, merges, ""), &tok));
    OK(ctx, rlhf_model_save_gguf(m, tok, test_path("a.gguf"), "f32"));
    gguf g = gguf_open(test_path("a.gguf"));
    CHECK_EQ_S(key(&g, "tokenizer.ggml.model"), "\"llama\"");
    CHECK_EQ_S(key(&g, "tokenizer.ggml.pre"), "\"default\"");
    CHECK_EQ_S(key(&g, "tokenizer.ggml.add_space_prefix"), "true");
    CHECK_EQ_S(key(&g, "tokenizer.ggml.merges"), "");
    /* The model's end tokens, since the tokenizer has none. */
    CHECK_EQ_S(key(&g, "tokenizer.ggml.eos_token_id"), "7");
    CHECK_EQ_S(key(&g, "tokenizer.ggml.eot_token_id"), "9");
    CHECK_EQ_S(key(&g, "tokenizer.ggml.unknown_token_id"), "0");
    const json_t *types = json_object_get(g.keys, "tokenizer.ggml.token_type");
    const json_t *scores = json_object_get(g.keys, "tokenizer.ggml.scores");
    static const int type[] = {0, 2, 1, 6, 256, 6, 257, 1, 263, 5};
    for (size_t i = 0; i < 10; i += 2)
        CHECK_EQ_I(json_integer_value(json_array_get(types, (size_t)type[i])), type[i + 1]);
    /* A piece's score is the rank of the first merge that makes it. */
    static const int score[] = {258, 0, 262, 0, 260, -1, 261, -2};
    for (size_t i = 0; i < 8; i += 2)
        CHECK_NEAR(json_number_value(json_array_get(scores, (size_t)score[i])), score[i + 1], 0);
    gguf_drop(&g);
    rlhf_tokenizer_close(tok);
    /* "ab" is a piece, but no merge makes it. */
    OK(ctx, rlhf_tokenizer_open(ctx, spm_write(",\"a\":257,\"b\":258,\"ab\":259", "", ""), &tok));
    CHECK_EQ_I(rlhf_model_save_gguf(m, tok, test_path("b.gguf"), "f32"), RLHF_ERR_UNSUPPORTED);
    CHECK(strstr(rlhf_error(ctx), "does not merge \"a\" and \"b\"") != NULL);
    rlhf_tokenizer_close(tok);
    rlhf_model_close(m);
    rlhf_close(ctx);
}

/* A byte-level tokenizer whose tokenizer.json is that of tok_make with one thing changed. */
static rlhf_tokenizer *tok_changed(rlhf_ctx *ctx, const char *key, const char *json) {
    rlhf_tokenizer *tok = tok_make(ctx), *changed = NULL;
    json_t *j = json_loads(tok->json, 0, NULL);
    json_object_set_new(j, key, json_loads(json, 0, NULL));
    char *whole = json_dumps(j, 0);
    if (rlhf_tokenizer_open(ctx, test_write("tokenizer.json", whole), &changed) != RLHF_OK)
        test_fail(__FILE__, __LINE__, "tokenizer: %s", rlhf_error(ctx));
    free(whole);
    json_decref(j);
    rlhf_tokenizer_close(tok);
    return changed;
}

TEST(what_is_refused) {
    static const char odd[] = "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\","
                              "\"pattern\":{\"Regex\":\"[aeiou]+\"},\"behavior\":\"Isolated\"},"
                              "{\"type\":\"ByteLevel\",\"use_regex\":false,"
                              "\"add_prefix_space\":false}]}";
    static const char twice[] = "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":"
                                "{\"id\":\"x\"}},{\"Sequence\":{\"id\":\"A\"}}],"
                                "\"special_tokens\":{\"x\":{\"ids\":[1,2]}}}";
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_model *m = model_make(ctx, gpt2, "", NULL, NULL), *scorer = NULL;
    const char *path = test_path("no.gguf");
    CHECK_EQ_I(rlhf_model_save_gguf(NULL, NULL, path, "f32"), RLHF_ERR_ARG);
    CHECK_EQ_I(rlhf_model_save_gguf(m, NULL, NULL, "f32"), RLHF_ERR_ARG);
    CHECK_EQ_I(rlhf_model_save_gguf(m, NULL, path, NULL), RLHF_ERR_ARG);
    CHECK_EQ_I(rlhf_model_save_gguf(m, NULL, path, "q4_0"), RLHF_ERR_ARG);
    CHECK(strstr(rlhf_error(ctx), "f32|f16|bf16|q8_0") != NULL);
    const struct {
        const char *key, *json, *says;
    } toks[] = {
        {"pre_tokenizer", odd, "by \"[aeiou]+"},
        {"normalizer", "{\"type\":\"NFKC\"}", "pre-tokenizer"},
        {"pre_tokenizer", "{\"type\":\"ByteLevel\",\"add_prefix_space\":true}", "known are"},
        {"post_processor", twice, "2 tokens before it"}};
    for (size_t i = 0; i < sizeof toks / sizeof *toks; i++) {
        rlhf_tokenizer *tok = tok_changed(ctx, toks[i].key, toks[i].json);
        CHECK_EQ_I(rlhf_model_save_gguf(m, tok, path, "f32"), RLHF_ERR_UNSUPPORTED);
        if (!strstr(rlhf_error(ctx), toks[i].says))
            test_fail(__FILE__, __LINE__, "%s: %s", toks[i].json, rlhf_error(ctx));
        rlhf_tokenizer_close(tok);
    }
    OK(ctx, rlhf_model_clone(m, RLHF_HEAD_SCORE, &scorer));
    CHECK_EQ_I(rlhf_model_save_gguf(scorer, NULL, path, "f32"), RLHF_ERR_UNSUPPORTED);
    rlhf_model_close(scorer);
    /* Found while the file is being written. */
    model_w(m, P_UP_W, 1)[5] = 1e6f;
    CHECK_EQ_I(rlhf_model_save_gguf(m, NULL, path, "f16"), RLHF_ERR_NUMERIC);
    CHECK(strstr(rlhf_error(ctx), "blk.1.ffn_up.weight") != NULL);
    CHECK_EQ_I(rlhf_model_save_gguf(m, NULL, test_path("none/a.gguf"), "f32"), RLHF_ERR_IO);
    rlhf_model_close(m);
    m = model_make(ctx, gpt2, "", "300", "60");
    rlhf_tokenizer *tok = tok_make(ctx);
    CHECK_EQ_I(rlhf_model_save_gguf(m, tok, path, "f32"), RLHF_ERR_ARG);
    rlhf_tokenizer_close(tok);
    rlhf_model_close(m);
    m = model_make(ctx, llama, slowed, "llama", "qwen2");
    CHECK_EQ_I(rlhf_model_save_gguf(m, NULL, path, "f32"), RLHF_ERR_UNSUPPORTED);
    rlhf_model_close(m);
    /* Nothing is left of any of them. */
    DIR *dir = opendir(test_dir());
    for (struct dirent *e; (e = readdir(dir));)
        if (strstr(e->d_name, "gguf")) test_fail(__FILE__, __LINE__, "%s is left", e->d_name);
    closedir(dir);
    rlhf_close(ctx);
}

/* Every allocation may fail; what remains is the old file or the new one. */
TEST(gguf_without_memory) {
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_model *m = model_make(ctx, llama, slowed, NULL, NULL);
    rlhf_tokenizer *tok = tok_make(ctx);
    size_t n, k;
    OK(ctx, rlhf_model_save_gguf(m, tok, test_path("a.gguf"), "q8_0"));
    unsigned char *whole = slurp(test_path("a.gguf"), &n);
    for (int64_t i = 0; test_next_oom(&i);) {
        rlhf_status status = rlhf_model_save_gguf(m, tok, test_path("a.gguf"), "q8_0");
        if (status != RLHF_OK) CHECK_EQ_I(status, RLHF_ERR_MEMORY);
        unsigned char *now = slurp(test_path("a.gguf"), &k);
        CHECK(n == k && memcmp(whole, now, n) == 0);
        free(now);
    }
    free(whole);
    rlhf_tokenizer_close(tok);
    rlhf_model_close(m);
    rlhf_close(ctx);
}

/* ---- TensorBoard ----------------------------------------------------------------------------- */

TEST(checksums) {
    /* CRC-32C of "123456789" is E3069283 in the literature. */
    uint32_t c = 0xe3069283;
    CHECK_EQ_I(train_crc("123456789", 9), (uint32_t)((c >> 15 | c << 17) + 0xa282ead8u));
}

/* One short run into D/run; resume: of its state. */
static void run_sft(int steps, int resume) {
    static const char data[] = "{\"text\":\"the cat sat\"}\n{\"text\":\"on the mat\"}\n";
    rlhf_ctx *ctx = test_context("auto", 1);
    rlhf_model *m = model_make(ctx, gpt2, "", NULL, NULL);
    rlhf_tokenizer *tok = tok_make(ctx);
    rlhf_data_config d = rlhf_data_config_default(RLHF_DATA_SFT);
    rlhf_sft_config c = rlhf_sft_config_default();
    rlhf_dataset *train = NULL;
    rlhf_trainer *t = NULL;
    OK(ctx, rlhf_dataset_parse(ctx, data, sizeof data - 1, "mem", tok, &d, &train));
    c.output_dir = test_path("run");
    c.max_steps = steps;
    c.per_device_train_batch_size = c.logging_steps = c.save_steps = 1;
    c.eval_steps = 2;
    c.resume = resume;
    OK(ctx, rlhf_sft_open(m, tok, train, train, &c, &t));
    OK(ctx, rlhf_trainer_run(t));
    rlhf_trainer_close(t);
    rlhf_dataset_close(train);
    rlhf_tokenizer_close(tok);
    rlhf_model_close(m);
    rlhf_close(ctx);
}

/* Follows the records of one file: checksums, the first two events, then steps from `step` on. */
static void check_events(const char *path, int step) {
    size_t n;
    unsigned char *p = slurp(path, &n);
    reader r = {p, n, 0};
    int records = 0;
    for (; r.at + 16 < n; records++) {
        const unsigned char *start = p + r.at;
        size_t size = (size_t)number(&r, 8);
        CHECK_EQ_I(number(&r, 4), train_crc(start, 8));
        const unsigned char *event = p + r.at;
        if (size > n - r.at) break;
        r.at += size;
        CHECK_EQ_I(number(&r, 4), train_crc(event, size));
        CHECK_EQ_I(event[0], 9);  /* field 1, a double: the time */
        CHECK_EQ_I(event[9], 16); /* field 2, an integer: the step */
        CHECK_EQ_I(event[10], records == 0 ? 0 : records == 1 ? step : step + records - 2);
        if (records == 0)
            CHECK(memcmp(event + 11,
                         "\x1a\x0d"
                         "brain.Event:2",
                         15) == 0);
        if (records == 1) CHECK(memcmp(event + 11, "\x3a\x02\x08\x01", 4) == 0 && size == 15);
        if (records < 2) continue;
        /* A summary; its first value is train/loss, a float. */
        CHECK_EQ_I(event[11], 42);
        size_t at = event[12] & 128 ? 14 : 13;
        CHECK(memcmp(event + at, "\x0a\x11\x0a\x0atrain/loss\x15", 15) == 0);
        int evals = 0;
        for (size_t i = 0; i + 9 < size; i++) evals += memcmp(event + i, "eval/loss", 9) == 0;
        CHECK_EQ_I(evals, (step + records - 2) % 2 == 0 || records == 3);
    }
    CHECK_EQ_I(r.at, n);
    CHECK_EQ_I(records, 2 + 2);
    free(p);
}

TEST(event_files) {
    run_sft(2, 0);
    run_sft(4, 1);
    char names[2][1100] = {"", ""};
    int count = 0;
    DIR *dir = opendir(test_path("run/runs"));
    for (struct dirent *e; dir && (e = readdir(dir));) {
        if (strncmp(e->d_name, "events.out.tfevents.", 20)) continue;
        if (count < 2)
            snprintf(names[count], sizeof names[0], "%s/%s", test_path("run/runs"), e->d_name);
        count++;
    }
    if (dir) closedir(dir);
    /* Two starts within a second of one process: still two files, in order of their names. */
    CHECK_EQ_I(count, 2);
    int later = strcmp(names[0], names[1]) < 0;
    check_events(names[!later], 1);
    check_events(names[later], 3);
}

TEST_MAIN(CASE(half_precision), CASE(brain_floats), CASE(blocks), CASE(a_gpt2), CASE(a_llama),
          CASE(sentencepiece_tokenizers), CASE(what_is_refused), CASE(gguf_without_memory),
          CASE(checksums), CASE(event_files))
