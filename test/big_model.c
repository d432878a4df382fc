/* A checkpoint of the shape of a published model, with random weights, for test/big.sh:
 *     big_model SHAPE VOCAB DIR        llama-1b, qwen-0.5b, llama-small, qwen-small
 * Writes DIR/config.json and DIR/model.safetensors in bfloat16; VOCAB 0 is the model's own.
 * Matrices and biases are normal with deviation 0.02, norms 1: a model as it is before any
 * training. */
#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

typedef struct shape {
    const char *name, *type;
    int vocab, d, layers, heads, kv, hd, ff, bias;
    const char *more;
} shape;

#define LLAMA                                                                                      \
    "\"rms_norm_eps\": 1e-05, \"rope_theta\": 500000.0, \"max_position_embeddings\": 131072, "     \
    "\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 32.0, \"low_freq_factor\": 1.0, "   \
    "\"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 8192}"
#define QWEN                                                                                       \
    "\"rms_norm_eps\": 1e-06, \"rope_theta\": 1000000.0, \"max_position_embeddings\": 32768, "     \
    "\"use_sliding_window\": false"

static const shape shapes[] = {
    {"llama-1b", "llama", 128256, 2048, 16, 32, 8, 64, 8192, 0, LLAMA},
    {"qwen-0.5b", "qwen2", 151936, 896, 24, 14, 2, 64, 4864, 1, QWEN},
    {"llama-small", "llama", 8192, 512, 4, 8, 2, 64, 2048, 0, LLAMA},
    {"qwen-small", "qwen2", 8192, 448, 4, 7, 1, 64, 2432, 1, QWEN}};

enum { TENSORS = 400, NORMALS = 1 << 16 };

static struct {
    char name[96];
    size_t rows, cols;
    int kind; /* 'n' normal, '1' ones, 'b' small */
} tensor[TENSORS];
static int tensors;
static uint16_t normal[NORMALS];

static void add(const char *name, size_t rows, size_t cols, int kind) {
    snprintf(tensor[tensors].name, sizeof tensor->name, "%s", name);
    tensor[tensors].rows = rows, tensor[tensors].cols = cols, tensor[tensors].kind = kind;
    tensors++;
}

static void add_layer(const shape *s, int l) {
    const struct {
        const char *name;
        int rows, cols, kind;
    } part[] = {{"input_layernorm.weight", s->d, 0, '1'},
                {"self_attn.q_proj.weight", s->heads * s->hd, s->d, 'n'},
                {"self_attn.k_proj.weight", s->kv * s->hd, s->d, 'n'},
                {"self_attn.v_proj.weight", s->kv * s->hd, s->d, 'n'},
                {"self_attn.o_proj.weight", s->d, s->heads * s->hd, 'n'},
                {"post_attention_layernorm.weight", s->d, 0, '1'},
                {"mlp.gate_proj.weight", s->ff, s->d, 'n'},
                {"mlp.up_proj.weight", s->ff, s->d, 'n'},
                {"mlp.down_proj.weight", s->d, s->ff, 'n'},
                {"self_attn.q_proj.bias", s->heads * s->hd, 0, 'b'},
                {"self_attn.k_proj.bias", s->kv * s->hd, 0, 'b'},
                {"self_attn.v_proj.bias", s->kv * s->hd, 0, 'b'}};
    for (int i = 0; i < 9 + 3 * s->bias; i++) {
        char name[96];
        snprintf(name, sizeof name, "model.layers.%d.%s", l, part[i].name);
        add(name, (size_t)part[i].rows, (size_t)part[i].cols, part[i].kind);
    }
}

static uint16_t bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

/* Quantiles of the normal distribution, by sums of twelve uniform numbers. */
static void make_normals(void) {
    srand(1);
    for (int i = 0; i < NORMALS; i++) {
        double sum = -6;
        for (int k = 0; k < 12; k++) sum += (double)rand() / ((double)RAND_MAX + 1);
        normal[i] = bf16((float)(0.02 * sum));
    }
}

static void write_tensor(FILE *f, size_t n, int kind) {
    static uint16_t block[1 << 15];
    static uint64_t state = 0x9e3779b97f4a7c15u;
    for (size_t done = 0; done < n;) {
        size_t some = n - done < (1 << 15) ? n - done : 1 << 15;
        for (size_t i = 0; i < some; i++) {
            state ^= state << 13, state ^= state >> 7, state ^= state << 17;
            block[i] = kind == '1' ? bf16(1) : normal[state >> 48];
        }
        done += fwrite(block, sizeof *block, some, f);
    }
}

static FILE *create(const char *dir, const char *name) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    if (!f) fprintf(stderr, "%s: %s\n", path, strerror(errno)), exit(1);
    return f;
}

static void write_config(const shape *s, const char *dir) {
    FILE *f = create(dir, "config.json");
    fprintf(f,
            "{\"model_type\": \"%s\", \"vocab_size\": %d, \"hidden_size\": %d, "
            "\"num_hidden_layers\": %d, \"num_attention_heads\": %d, \"num_key_value_heads\": %d, "
            "\"head_dim\": %d, \"intermediate_size\": %d, \"hidden_act\": \"silu\", "
            "\"tie_word_embeddings\": true, \"torch_dtype\": \"bfloat16\", %s}\n",
            s->type, s->vocab, s->d, s->layers, s->heads, s->kv, s->hd, s->ff, s->more);
    fclose(f);
}

static void write_weights(const char *dir) {
    char header[TENSORS * 160];
    size_t at = 0, n = 0;
    for (int i = 0; i < tensors; i++) {
        size_t size = tensor[i].rows * (tensor[i].cols ? tensor[i].cols : 1);
        n += (size_t)snprintf(header + n, sizeof header - n, "%c\"%s\":%s[%zu", i ? ',' : '{',
                              tensor[i].name, "{\"dtype\":\"BF16\",\"shape\":", tensor[i].rows);
        if (tensor[i].cols)
            n += (size_t)snprintf(header + n, sizeof header - n, ",%zu", tensor[i].cols);
        n += (size_t)snprintf(header + n, sizeof header - n, "],\"data_offsets\":[%zu,%zu]}", at,
                              at + 2 * size);
        at += 2 * size;
    }
    header[n++] = '}';
    while (n % 8) header[n++] = ' ';
    FILE *f = create(dir, "model.safetensors");
    uint64_t length = n; /* little-endian, as every machine this runs on */
    fwrite(&length, sizeof length, 1, f);
    fwrite(header, 1, n, f);
    for (int i = 0; i < tensors; i++)
        write_tensor(f, tensor[i].rows * (tensor[i].cols ? tensor[i].cols : 1), tensor[i].kind);
    if (ferror(f) | fclose(f)) fprintf(stderr, "%s: %s\n", dir, strerror(errno)), exit(1);
    printf("%.3f billion parameters\n", (double)at / 2e9);
}

int main(int argc, char **argv) {
    shape s = {0};
    for (size_t i = 0; argc == 4 && i < sizeof shapes / sizeof *shapes; i++)
        if (!strcmp(argv[1], shapes[i].name)) s = shapes[i];
    if (!s.name) {
        fprintf(stderr, "big_model llama-1b|qwen-0.5b|llama-small|qwen-small VOCAB DIR\n");
        return 2;
    }
    if (atoi(argv[2])) s.vocab = atoi(argv[2]);
    mkdir(argv[3], 0777);
    make_normals();
    add("model.embed_tokens.weight", (size_t)s.vocab, (size_t)s.d, 'n');
    for (int l = 0; l < s.layers; l++) add_layer(&s, l);
    add("model.norm.weight", (size_t)s.d, 0, '1');
    write_config(&s, argv[3]);
    write_weights(argv[3]);
    return 0;
}
