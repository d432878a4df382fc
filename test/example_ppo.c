/* A language model, trained by PPO on a reward that is a C function:
 *     example_ppo [MODEL_DIR [OUT_DIR]]
 * MODEL_DIR is a Hugging Face directory; without it a small model with random weights is made. */
#include "rlhf.h"
#include <stdio.h>
#include <string.h>

/* The reward of an answer: the number of vowels in it. */
static rlhf_status vowels(void *user, const rlhf_sample *answers, int n, float *reward) {
    (void)user;
    for (int i = 0; i < n; i++) {
        reward[i] = 0;
        for (const char *c = answers[i].completion; *c; c++) reward[i] += !!strchr("aeiou", *c);
    }
    return RLHF_OK;
}

#define TRY(call) if ((status = (call)) != RLHF_OK) goto done

int main(int argc, char **argv) {
    const char *out = argc > 2 ? argv[2] : "build/example_ppo.model";
    const char *prompts = "{\"prompt\": \"Once upon a time\"}\n{\"prompt\": \"The sea is\"}\n";
    size_t length = strlen(prompts);
    rlhf_ctx *ctx = NULL;
    rlhf_tokenizer *tokenizer = NULL;
    rlhf_model *model = NULL;
    rlhf_dataset *data = NULL;
    rlhf_trainer *ppo = NULL;
    rlhf_status status;

    TRY(rlhf_open(&ctx, NULL));
    if (argc > 1) {
        TRY(rlhf_tokenizer_open(ctx, argv[1], &tokenizer));
        TRY(rlhf_model_open(ctx, argv[1], &model));
    } else { /* 256 bytes and an end token, shaped as a config.json says */
        TRY(rlhf_tokenizer_train(ctx, &prompts, &length, 1, 257, &tokenizer));
        TRY(rlhf_model_init(ctx, "data/demo_config.json", 257, -1, 256, 1, &model));
    }
    rlhf_data_config kind = rlhf_data_config_default(RLHF_DATA_PROMPT);
    TRY(rlhf_dataset_parse(ctx, prompts, length, "prompts", tokenizer, &kind, &data));
    rlhf_ppo_config config = rlhf_ppo_config_default();
    config.learning_rate = argc > 1 ? 1e-5 : 3e-3;
    config.batch_size = 32; /* answers for each of */
    config.max_steps = 10;  /* so many updates */
    config.response_length = 16;
    TRY(rlhf_ppo_open(model, tokenizer, data, NULL, vowels, NULL, &config, &ppo));
    while (rlhf_trainer_steps_done(ppo) < rlhf_trainer_steps_total(ppo)) {
        TRY(rlhf_trainer_step(ppo)); /* one rollout and its optimizer steps */
        printf("reward %.2f  KL %.2f\n", rlhf_trainer_metric(ppo, "objective/scores"),
               rlhf_trainer_metric(ppo, "objective/kl"));
    }
    TRY(rlhf_model_save(model, tokenizer, out)); /* again a Hugging Face directory */
done:
    if (status) fprintf(stderr, "%s: %s\n", rlhf_status_text(status), rlhf_error(ctx));
    rlhf_trainer_close(ppo), rlhf_dataset_close(data), rlhf_model_close(model);
    rlhf_tokenizer_close(tokenizer), rlhf_close(ctx);
    return status != RLHF_OK;
}
