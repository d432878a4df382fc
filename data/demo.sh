#!/usr/bin/env bash
# demo.sh: does it matter who gives the feedback?
#
# Trains one small language model from scratch, aligns it by PPO on the judgement of experts, of lay
# people, and twice of a crowd of experts, lay and careless people of whom nobody says who is which:
# once with every judgement worth the same, once weighted by how reliable its annotator proves to be
# -- and compares the models on questions none of them has seen. Every step is a public command of
# rlhf and is shown before it runs.
#
# Called by `make demo` from the root of the repository. Environment: RLHF (the program, ./rlhf),
# DEMO_TOOL (built from data/demo.c, build/demo-tool), DEMO_OUT (build/demo), DEMO_CONFIG
# (data/demo_config.json), DEMO_SEED (1), DEMO_THREADS (as many as the machine has), DEMO_DTYPE (f32),
# DEMO_FEEDBACK (all four; of some, only the training is done and nothing is compared).
set -eu

rlhf=${RLHF:-./rlhf}
tool=${DEMO_TOOL:-build/demo-tool}
out=${DEMO_OUT:-build/demo}
config=${DEMO_CONFIG:-data/demo_config.json}
seed=${DEMO_SEED:-1}
common="--seed $seed${DEMO_THREADS:+ --threads $DEMO_THREADS}${DEMO_DTYPE:+ --dtype $DEMO_DTYPE}"
data=$out/data
began=$SECONDS

say() { printf '\n# %s\n' "$*"; }

run() {
    printf '$ %s\n' "$*"
    "$@"
}

# Runs a command whose result is kept in a file; its last line is one JSON object.
run_to() {
    local file=$1
    shift
    printf '$ %s > %s\n' "$*" "$file"
    "$@" > "$file"
}

feedback=${DEMO_FEEDBACK:-expert lay crowd crowd-em}
rm -rf "${out:?}"/{data,tokenizer,sft,rm-*,ppo-*}
rm -f "$out"/*.json "$out"/*.jsonl
mkdir -p "$data"

say "The material: questions from four fields with demonstrations of mixed quality, and pairs of" \
    "answers, each pair compared by an expert and by a lay person; others by six people of a crowd."
run "$tool" generate "$data"

say "1. A tokenizer, learned from the text."
run "$rlhf" tokenizer --train "$data/corpus.txt" --vocab_size 768 --out "$out/tokenizer"

say "2. Supervised fine-tuning, here from random weights: the model imitates the demonstrations," \
    "mistakes and tone included."
run "$rlhf" sft --init "$config" --tokenizer "$out/tokenizer" \
    --data "$data/sft.jsonl" --eval_data "$data/sft_eval.jsonl" --out "$out/sft" \
    --learning_rate 1.5e-3 --lr_scheduler_type cosine --warmup_steps 50 \
    --num_train_epochs 2 --per_device_train_batch_size 32 --max_length 128 $common

for who in $feedback; do
    # Tone shows on the surface: a third of the comparisons is enough to learn it. The others are
    # given 12,000 judgements each.
    judged=$who truth=$who options=
    case $who in
    expert) epochs=1.5 remark="It has to find out what is right." ;;
    lay) epochs=0.5 remark="The same pairs, other judges." ;;
    crowd) truth=expert epochs=1 remark="Every judgement counts the same." ;;
    crowd-em)
        judged=crowd truth=expert epochs=1 options="--annotator_weights em"
        remark="Whom to trust is estimated."
        say "Who of the crowd can be trusted? Nobody has said; how they agree tells."
        run "$rlhf" raters --data "$data/prefs_crowd.jsonl" --disputed 3 $common
        run_to "$out/raters.json" "$rlhf" raters --data "$data/prefs_crowd.jsonl" --bootstrap 0 \
            --json $common
        ;;
    esac
    say "3. A reward model from the comparisons of the ${who%-em} raters. $remark"
    run "$rlhf" rm --model "$out/sft" $options \
        --data "$data/prefs_$judged.jsonl" --eval_data "$data/prefs_${truth}_eval.jsonl" \
        --out "$out/rm-$who" --learning_rate 5e-4 --lr_scheduler_type cosine --warmup_steps 10 \
        --num_train_epochs "$epochs" --per_device_train_batch_size 32 \
        --center_rewards_coefficient 0.01 --max_length 128 $common
done

for who in $feedback; do
    say "4. PPO: the SFT model answers, the $who reward model scores, the policy follows the" \
        "score but pays for every step away from the SFT model (kl_coef)."
    run "$rlhf" ppo --model "$out/sft" --reward "$out/rm-$who" --data "$data/ppo_prompts.jsonl" \
        --out "$out/ppo-$who" --learning_rate 4e-4 --kl_coef 0.2 --max_steps 30 \
        --batch_size 128 --num_ppo_epochs 2 --num_mini_batches 2 --response_length 12 \
        --temperature 1.0 --missing_eos_penalty 1.0 --gamma 1.0 --lam 0.95 \
        --cliprange 0.2 --cliprange_value 0.2 --vf_coef 0.1 --best_of_n 16 $common
done

[ -z "${DEMO_FEEDBACK:-}" ] || exit 0

say "5. The examination: each model answers the held-out questions; the reward models of experts" \
    "and of lay people score the answers; eval measures how far the model has moved from the SFT model."
models=()
for name in sft $(printf 'ppo-%s ' $feedback); do
    answers=$out/$name.answers.jsonl
    run "$rlhf" generate --model "$out/$name" --data "$data/test.jsonl" --out "$answers" \
        --temperature 1.0 --max_new_tokens 12 $common
    for who in expert lay; do
        run "$rlhf" score --model "$out/rm-$who" --data "$answers" \
            --out "$out/$name.by-$who.jsonl" $common
    done
    run_to "$out/$name.eval.json" "$rlhf" eval --model "$out/$name" --ref "$out/sft" \
        --data "$answers" --json $common
    models+=(--model "$name" --gens "$answers" --expert "$out/$name.by-expert.jsonl"
             --lay "$out/$name.by-lay.jsonl" --eval "$out/$name.eval.json" --dir "$out/$name")
done

say "The result."
"$tool" judge --out "$out/summary.json" --crowd "$out/raters.json" "${models[@]}"
"$tool" chart "$out/summary.json" "$out/chart.svg"
printf '%-12s %s\n' "chart" "$out/chart.svg"
printf '%-12s %s and %s\n' "reward" "$out/rm-expert" "$out/rm-lay"

say "All runs on one page: curves, reward against KL, slices, answers before and after."
run "$rlhf" report "$out"/ppo-*/ "$out"/rm-*/ "$out/sft" --raters "$out/raters.json" \
    --out "$out/report.html"
printf '\nThe demo took %d seconds.\n' $((SECONDS - began))
