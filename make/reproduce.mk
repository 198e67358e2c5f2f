# The published model from its sources, with the hyper-parameters it was published with.
#
#   MODEL     the language model to start from: a folder, or a name of the catalogue
#   GPUS      worker processes, any number; a step has the published samples, see BATCH_1, BATCH_2
#   DRY_RUN   1: print every command line instead of running it
#
# Every step is a file: `make summary` runs what is missing, a second run goes on where the first
# one stopped.

MODEL       ?= vicuna-7b
GPUS        ?= 4
DRY_RUN     ?=
CHECKPOINTS ?= checkpoints
DATA        ?= data

BASE      = $(if $(findstring /,$(MODEL)),$(MODEL),$(CHECKPOINTS)/$(MODEL))
ENCODER   = $(CHECKPOINTS)/imagebind/imagebind_huge.pth
STAGE_1   = $(CHECKPOINTS)/chatbind-7b-pretrain
PROJECTOR = $(CHECKPOINTS)/mm_projector/chatbind-7b-pretrain.bin
STAGE_2   = $(CHECKPOINTS)/chatbind-7b
RESULTS   = $(STAGE_2)/eval

# samples a step, published as 4 GPUs x 16 (or 4) samples x 2 accumulated
BATCH_1 = 128
BATCH_2 = 32

ifdef DRY_RUN
PROGRAM = @print() { printf '%q ' "$$@"; echo; }; print chatbind
READY   =
done    =
else
PROGRAM = $(CHATBIND)
READY   = install
done    = touch $@
endif

.PHONY: data weights pretrain projector finetune answers reviews summary

data: $(DATA)/.done  ## captions, instructions and pictures of both stages
$(DATA)/.done: | $(READY)
	$(PROGRAM) download cc3m-595k llava-instruct-150k coco-train2014 coco-val2014 llava-eval-90
	$(done)

weights: $(CHECKPOINTS)/.done  ## ImageBind and the language model
$(CHECKPOINTS)/.done: | $(READY)
	$(PROGRAM) download imagebind-huge $(if $(findstring /,$(MODEL)),,$(MODEL))
	$(done)

pretrain: $(STAGE_1)/config.json  ## stage 1: the projector on 595K captions
$(STAGE_1)/config.json: $(DATA)/.done $(CHECKPOINTS)/.done
	$(PROGRAM) pretrain --model $(BASE) --encoder $(ENCODER) \
	  --data $(DATA)/cc3m-595k/chat.json --media-root $(DATA)/cc3m-595k/images \
	  --mm-use-im-start-end --bf16 True --output $(STAGE_1) \
	  --num-train-epochs 1 --per-device-train-batch-size 16 \
	  --global-batch-size $(BATCH_1) --save-steps 2400 --save-total-limit 1 \
	  --learning-rate 2e-3 --weight-decay 0. --warmup-ratio 0.03 --lr-scheduler-type cosine \
	  --logging-steps 1 --tf32 True --model-max-length 2048 \
	  --num-processes $(GPUS)

projector: $(PROJECTOR)  ## the projector of stage 1 as one file
$(PROJECTOR): $(STAGE_1)/config.json
	$(PROGRAM) extract-projector --model $(STAGE_1) --output $(PROJECTOR)

finetune: $(STAGE_2)/config.json  ## stage 2: projector and language model on 150K instructions
$(STAGE_2)/config.json: $(PROJECTOR)
	$(PROGRAM) finetune --model $(BASE) --encoder $(ENCODER) --projector $(PROJECTOR) \
	  --data $(DATA)/llava-instruct/llava_instruct_150k.json \
	  --media-root $(DATA)/coco/train2014 \
	  --mm-use-im-start-end True --bf16 True --output $(STAGE_2) \
	  --num-train-epochs 3 --per-device-train-batch-size 4 \
	  --global-batch-size $(BATCH_2) --save-steps 5000 --save-total-limit 3 \
	  --learning-rate 2e-5 --weight-decay 0. --warmup-ratio 0.03 --lr-scheduler-type cosine \
	  --logging-steps 1 --tf32 True --fsdp "full_shard auto_wrap" \
	  --fsdp-transformer-layer-cls-to-wrap LlamaDecoderLayer \
	  --model-max-length 2048 --num-processes $(GPUS)

# Answers and reviews are streams that grow, so being there does not mean being done.
answers: $(RESULTS)/.answered  ## answers to the 90 evaluation questions
$(RESULTS)/.answered: $(STAGE_2)/config.json
	$(PROGRAM) vqa --model $(STAGE_2) --encoder $(ENCODER) \
	  --questions $(DATA)/eval/qa90_questions.jsonl --media-root $(DATA)/coco/val2014 \
	  --output $(RESULTS)/answers.jsonl
	$(done)

reviews: $(RESULTS)/.reviewed  ## a judge's scores, beside text-only GPT-4 (needs OPENAI_API_KEY)
$(RESULTS)/.reviewed: $(RESULTS)/.answered
	$(PROGRAM) review --question $(DATA)/eval/qa90_questions.jsonl \
	  --context $(DATA)/eval/caps_boxes_coco2014_val_80.jsonl \
	  --answer-list $(DATA)/eval/qa90_gpt4_answer.jsonl $(RESULTS)/answers.jsonl \
	  --rule $(DATA)/eval/rule.json --judge openai --output $(RESULTS)/reviews.jsonl
	$(done)

summary: $(RESULTS)/.reviewed  ## the table of relative scores
	$(PROGRAM) summarize $(RESULTS)/reviews.jsonl
