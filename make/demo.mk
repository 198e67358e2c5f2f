# The whole path on a toy world: two base models and ten digits in six modalities, made on the spot.
#
# Training sees images only. The last table shows, for each modality, how many answers about held-out
# digits are right, beside a run whose encoder's audio, depth, thermal and IMU towers were never
# bound to images. A second run makes only what is missing.
#
# DEMO_ENCODER=pe-av takes an encoder in the layout of the Hugging Face hub in place of ImageBind, in
# the modalities that it has.

DEMO         ?= demo
DEMO_ENCODER ?= imagebind
TOY    = $(DEMO)/toy
D_RUN  = $(if $(filter imagebind,$(DEMO_ENCODER)),$(DEMO),$(DEMO)/$(DEMO_ENCODER))
D_EVAL = $(D_RUN)/eval
MODALITIES = image video audio $(if $(filter imagebind,$(DEMO_ENCODER)),depth thermal imu)

.PHONY: demo

# Models this small lose more by sharing their work between threads than they win.
demo: export OMP_NUM_THREADS ?= 1
demo: install  ## the whole path on a toy world, on a CPU (no downloads)
	mkdir -p $(D_EVAL)
	$(CHATBIND) toy $(TOY) $(if $(filter pe-av,$(DEMO_ENCODER)),--huggingface)
	$(CHATBIND) encode --encoder $(TOY)/$(DEMO_ENCODER) --data $(TOY)/train/captions.json \
	  --media-root $(TOY)/media --store $(D_RUN)/store
	$(CHATBIND) pretrain --model $(TOY)/llama --encoder $(TOY)/$(DEMO_ENCODER) --store $(D_RUN)/store \
	    --data $(TOY)/train/captions.json --num-train-epochs 2 \
	    --gradient-accumulation-steps 1 --learning-rate 1e-2 --output $(D_RUN)/pretrain \
	  | $(CHATBIND) extract-projector - --output $(D_RUN)/projector.safetensors \
	  | $(CHATBIND) finetune --model $(TOY)/llama --encoder $(TOY)/$(DEMO_ENCODER) \
	    --store $(D_RUN)/store --projector - \
	    --data $(TOY)/train/instructions.json --num-train-epochs 1 \
	    --per-device-train-batch-size 16 --gradient-accumulation-steps 1 --learning-rate 1e-3 \
	    --output $(D_RUN)/model | tail -n 1
	$(CHATBIND) ask --model $(D_RUN)/model --image $(TOY)/media/image/heldout-0000.png \
	  "Which digit is this?"
	$(CHATBIND) ask --model $(D_RUN)/model --audio $(TOY)/media/audio/heldout-0000.wav \
	  "Describe it in detail."
	cat $(MODALITIES:%=$(TOY)/eval/questions-%.jsonl) > $(D_EVAL)/questions.jsonl
	$(CHATBIND) vqa --model $(D_RUN)/model --questions $(D_EVAL)/questions.jsonl \
	  --media-root $(TOY)/media --output $(D_EVAL)/answers.jsonl
	$(CHATBIND) vqa --model $(D_RUN)/model --questions $(D_EVAL)/questions.jsonl \
	  --encoder $(TOY)/$(DEMO_ENCODER)-unbound --allow-encoder-mismatch \
	  --media-root $(TOY)/media --output $(D_EVAL)/answers-unbound.jsonl
	$(CHATBIND) review --question $(D_EVAL)/questions.jsonl --judge rule \
	  --answer-list $(D_EVAL)/answers-unbound.jsonl $(D_EVAL)/answers.jsonl \
	  --output $(D_EVAL)/reviews.jsonl
	@echo "Accuracy: right answers, left with towers never bound to images, right with bound ones."
	@echo "A guess is right in 10 % of the cases. Training has seen images only."
	$(CHATBIND) summarize $(D_EVAL)/reviews.jsonl --by modality --names unbound bound --format table
