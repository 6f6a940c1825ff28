"""What a training step costs with every method, beside a plain LoRA of as many trained numbers.

    python -m bench.costs --model minilm --out FOLDER

For each method of the catalogue, and some of PEFT's own as landmarks: the time of a step, the bytes kept for the
backward pass, the optimiser's state and the saved file, each as a multiple of a LoRA's, whose rank is the one that
comes nearest in trained numbers. Both train the same model on the same batch (8 examples of 32 tokens) and take their
steps in turns, so that what disturbs the machine disturbs both. `FOLDER/MODEL.jsonl` has one row for each method;
finished ones are not measured again. `FOLDER/README.md` has the tables.

=========  ============================================================
methods    which settings each method is measured with
training   a model, its optimiser and controller, and one step of them
saved      what autograd keeps for the backward pass
measure    one method beside its LoRA: one row
tables     from rows to the page
=========  ============================================================
"""
