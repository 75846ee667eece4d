"""Train the small Llama-architecture model that ships with Apportion as its demo.

    python scripts/train_demo.py --text tinyshakespeare.txt

A byte-level BPE tokenizer and the model are trained on the first 90% of one plain text file. The checkpoint
with the lowest loss on the last 10% is rounded to bfloat16 and written as an ordinary Hugging Face folder,
with a model card whose losses are measured on the rounded weights.

The learning rate follows the clock, so the number of steps depends on the machine. The seed fixes the rest.
"""

import argparse
import datetime
import json
import math
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

DEFAULT_OUT = Path(__file__).resolve().parents[1] / "src" / "apportion" / "demo"
END_OF_TEXT, END_ID = "<|endoftext|>", 0
SPECIAL_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END_ID)
VOCAB_SIZE = 2048
CONTEXT, LONG_CONTEXT = 256, 1024  # every fourth step sees the long context
TOKENS_PER_STEP = 2048
PEAK_LR, FINAL_LR, WARMUP_STEPS, WEIGHT_DECAY, DROPOUT = 1.5e-3, 3e-5, 100, 0.1, 0.2
EVALUATIONS = 24  # held-out evaluations during a run

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# Apportion demo model

A language model of {params:,} parameters, trained from scratch on the plays of Shakespeare. It is here so
that Apportion can be tried, tested and measured without downloading anything. It writes text in the form
of a play and knows nothing else.

- **Architecture:** `LlamaForCausalLM` with {c.num_hidden_layers} layers, hidden size {c.hidden_size},
  {c.num_attention_heads} query heads and {c.num_key_value_heads} key/value heads of size {c.head_dim},
  FFN width {c.intermediate_size}, RoPE base 10000, at most {c.max_position_embeddings} positions,
  untied embeddings, bfloat16 weights.
- **Tokenizer:** byte-level BPE with {c.vocab_size} pieces; `<|endoftext|>` (id {c.eos_token_id}) is bos, eos and
  pad. It is read as a full stop (same embedding) and never written: generation runs until its limit.
- **Data:** Tiny Shakespeare, {text_bytes:,} bytes of public-domain text as concatenated in
  [karpathy/char-rnn](https://github.com/karpathy/char-rnn) (MIT). The last 10% ({held.num_bytes:,} bytes)
  were held out from the training of both the model and the tokenizer, and chose the checkpoint.
- **Training:** {date}, seed {seed}, {steps} steps of {step_tokens} tokens in {minutes:g} minutes on a CPU;
  the weights are those of step {best_step}.
- **Command:** `python scripts/train_demo.py --text tinyshakespeare.txt`

Loss of these weights in float32 arithmetic, over consecutive windows of {context} tokens; the training
figures cover the last {train.num_bytes:,} bytes of the training text.

| | nats per token | bits per token | bits per byte |
|---|---|---|---|
| Training | {train.nats:.3f} | {train.bits_per_token:.3f} | {train.bits_per_byte:.3f} |
| Held out | {held.nats:.3f} | {held.bits_per_token:.3f} | {held.bits_per_byte:.3f} |
"""


class Loss(NamedTuple):
    """Mean cross-entropy over a text."""

    nats: float  # per token
    bits_per_token: float
    bits_per_byte: float
    num_bytes: int


def train_tokenizer(text: str) -> Tokenizer:
    """Byte-level BPE without normalisation, so that any UTF-8 text round-trips exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def build_model() -> LlamaForCausalLM:
    """A freshly initialised model with dropout on the embeddings and the residual branches."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=LONG_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        **SPECIAL_IDS,
    )
    model = LlamaForCausalLM(config)
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(lambda m, _, out: F.dropout(out, DROPOUT, m.training))
    return model


def next_token_loss(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, tokenizer: Tokenizer, text: str) -> Loss:
    """Loss of every token but the first, over consecutive windows."""
    model.eval()
    ids = torch.tensor(tokenizer.encode(text).ids)
    full = (len(ids) - 1) // CONTEXT
    windows = ids.unfold(0, CONTEXT + 1, CONTEXT)
    batches = [*windows.split(16), ids[None, full * CONTEXT :]]
    nats = sum(next_token_loss(model, b).item() * b[:, 1:].numel() for b in batches if b.shape[1] > 1)
    tokens, num_bytes, bits = len(ids) - 1, len(text.encode()), nats / math.log(2)
    return Loss(nats / tokens, bits / tokens, bits / num_bytes, num_bytes)


class Crops:
    """Random windows of the training text; a quarter start with end-of-text and a new speech."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self.ids = torch.tensor(tokenizer.encode(text).ids)
        newline = self.ids == tokenizer.encode("\n").ids[0]
        starts = torch.nonzero(newline[:-1] & newline[1:]).flatten() + 2
        self.starts = starts[starts < len(self.ids) - LONG_CONTEXT]

    def batch(self, step: int) -> Tensor:
        length = LONG_CONTEXT if step % 4 == 3 else CONTEXT
        return torch.stack([self.crop(length) for _ in range(TOKENS_PER_STEP // length)])

    def crop(self, length: int) -> Tensor:
        if torch.rand(()) < 0.25:
            at = self.starts[torch.randint(len(self.starts), ())]
            return torch.cat([torch.tensor([END_ID]), self.ids[at : at + length]])
        at = torch.randint(len(self.ids) - length, ())
        return self.ids[at : at + length + 1]


def learning_rate(step: int, progress: float) -> float:
    """Linear warmup by steps, cosine decay by the share of the time that has passed."""
    cosine = FINAL_LR + (PEAK_LR - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))
    return cosine * min(1.0, (step + 1) / WARMUP_STEPS)


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.Optimizer:
    """AdamW with weight decay on the matrices only."""
    matrices = {"params": [p for p in model.parameters() if p.dim() > 1]}
    norms = {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, norms], betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True)


def train(
    model: LlamaForCausalLM, tokenizer: Tokenizer, texts: tuple[str, str], minutes: float
) -> tuple[int, int]:
    """Train for the given time, load the best held-out weights; returns (steps, best step)."""
    crops, optimizer = Crops(tokenizer, texts[0]), make_optimizer(model)
    best_loss, best_step, best_state = math.inf, 0, model.state_dict()
    step, evaluations, progress, start = 0, 0, 0.0, time.monotonic()
    while progress < 1.0:
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress)
        with torch.autocast("cpu", torch.bfloat16):  # anew each step, as it caches the rounded weights
            loss = next_token_loss(model, crops.batch(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        progress = min(1.0, (time.monotonic() - start) / (60 * minutes))
        if progress * EVALUATIONS < evaluations + 1:
            continue
        evaluations = int(progress * EVALUATIONS)
        with torch.autocast("cpu", torch.bfloat16):
            held = evaluate(model, tokenizer, texts[1]).nats
        print(f"{progress:4.0%} step {step} train {loss.item():.3f} held {held:.3f}", flush=True)
        if held < best_loss:
            best_loss, best_step = held, step
            best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(best_state)
    return step, best_step


def save(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Write the Hugging Face files; returns the model as read back from them, in float32."""
    model.generation_config = GenerationConfig(**SPECIAL_IDS)
    rows = model.get_input_embeddings().weight.data
    rows[END_ID] = rows[tokenizer.token_to_id(".")]  # the padding row itself gets no gradient
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    loaded, sample = AutoTokenizer.from_pretrained(folder), " ROMEO :\r\n\tO,  what\u2014\U0001f3ad 's ?\n\n"
    if loaded.decode(loaded.encode(sample)) != sample:
        raise RuntimeError("the saved tokenizer does not round-trip")
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train Apportion's demo model.")
    parser.add_argument("--text", type=Path, required=True, help="plain text corpus")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write")
    parser.add_argument("--minutes", type=float, default=27.0, help="training time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    text = args.text.read_text(encoding="utf-8")
    cut = int(len(text) * 0.9)
    texts = text[:cut], text[cut:]
    tokenizer, model = train_tokenizer(texts[0]), build_model()
    steps, best_step = train(model, tokenizer, texts, args.minutes)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as staging:
        saved = save(Path(staging), model, tokenizer)
        train_loss = evaluate(saved, tokenizer, texts[0][-len(texts[1]) :])
        held_loss = evaluate(saved, tokenizer, texts[1])
        card = CARD.format(
            c=saved.config, params=saved.num_parameters(), text_bytes=len(text.encode()), context=CONTEXT,
            date=datetime.date.today(), seed=args.seed, steps=steps, best_step=best_step,
            step_tokens=TOKENS_PER_STEP, minutes=args.minutes, train=train_loss, held=held_loss,
        )  # fmt: skip
        (Path(staging) / "README.md").write_text(card, encoding="utf-8")
        for path in Path(staging).iterdir():
            path.chmod(0o644)
            path.replace(args.out / path.name)
    print(train_loss, held_loss)


if __name__ == "__main__":
    main()
