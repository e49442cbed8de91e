"""Language models of transformers, tiny and unmodified, trained in a plain loop and under Hugging Face Trainer.

    python -m tests.integration.clients [CLIENT …]

prints for each client what is recorded, what is declared absent, and the warnings of the verdict.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import monitor
from tests.record import moe
from tests.record.trainings import Digest, Watch, seed

LAYERS, HEADS, WORDS, LENGTH = 2, 4, 64, 16

_LLAMA: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
#: Dropout is 0.1 unless it is told otherwise.
_GPT2: dict[str, Any] = {
    "vocab_size": WORDS, "n_embd": 32, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
#: Name -> class of transformers and what its configuration is given, besides the mixtures in `tests.record.moe`.
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", _GPT2),
    "gpt2_eager": ("GPT2", _GPT2 | {"attn_implementation": "eager"}),
    "gpt2_plain": ("GPT2", _GPT2 | {"attn_pdrop": 0.0}),
    "llama": ("Llama", _LLAMA),  # two heads of queries to one of keys
    "llama_eager": ("Llama", _LLAMA | {"attn_implementation": "eager"}),
    "llama_dropout": ("Llama", _LLAMA | {"attention_dropout": 0.1}),
    "mistral_window": ("Mistral", _LLAMA | {"sliding_window": 6}),
    "gemma2_window": ("Gemma2", _LLAMA | {"sliding_window": 6, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "qwen3": ("Qwen3", _LLAMA | {"head_dim": 8}),  # its queries and keys are normalised
}  # fmt: skip
ALL = (*DENSE, *moe.CLIENTS)


def client(name: str) -> nn.Module:
    """The model, the same at every call."""
    import transformers

    if name in moe.CLIENTS:
        return moe.client(name)
    kind, options = DENSE[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    return getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).train()


def loop(name: str, watch: Watch, steps: int = 12, reentrant: bool | None = None) -> str:
    """A plain loop over random tokens; digest of all that it leaves behind.

    Args:
        name: the client.
        watch: called with the model once.
        steps: updates.
        reentrant: the kind of gradient checkpointing; None is none.
    """
    model = client(name)
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})  # pyright: ignore[reportCallIssue]
    seed()
    digest = Digest()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch(model)
    for _ in range(steps):
        tokens = torch.randint(0, WORDS, (2, LENGTH))
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        digest.add(loss)
    return digest.finish(model, optimizer)


def trainer(name: str, watch: Watch, steps: int = 12, reentrant: bool | None = None) -> str:
    """The same under Hugging Face Trainer: two micro-batches, clipping, a decaying learning rate, evaluation."""
    from transformers import Trainer, TrainingArguments

    model = client(name)
    seed()
    tokens = torch.randint(0, WORDS, (48, LENGTH))
    data: Any = [{"input_ids": t, "labels": t} for t in tokens]
    again: dict[str, Any] = {}
    if reentrant is not None:
        again = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=4, seed=0, eval_strategy="steps",
            eval_steps=6, learning_rate=1e-3, **again,
        )  # fmt: skip
        made = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8])
        watch(model)
        made.train()
    digest = Digest()
    digest.add([x.get("eval_loss") for x in made.state.log_history])
    inner: Any = getattr(made.optimizer, "optimizer", made.optimizer)
    return digest.finish(model, inner)


Way = Callable[..., str]
WAYS: dict[str, Way] = {"loop": loop, "trainer": trainer}


def recorded(name: str, folder: Path, way: Way = loop, **how: Any) -> tuple[str, monitor.Run]:
    """Digest and run of a training that is recorded."""
    handles: list[monitor.Handle] = []
    digest = way(name, lambda model: handles.append(monitor.attach(model, folder)), **how)
    handles[0].close()
    return digest, monitor.open(folder)


def _tell(name: str, kind: str, folder: Path, **how: Any) -> None:
    digest, run = recorded(name, folder, WAYS[kind], **how)
    same = digest == WAYS[kind](name, lambda _: None, **how)
    print(f"\n{name}, {kind}{''.join(f', {k}={v}' for k, v in how.items())}: {'' if same else 'NOT '}bitwise equal")
    modules: Counter[str] = Counter()
    for ref in run.refs():
        modules[ref.partition(".")[0]] = max(modules[ref.partition(".")[0]], len(run.modules(ref)))
    print("  recorded", ", ".join(f"{metric} {count}" for metric, count in sorted(modules.items())))
    for absent in run.info["absent"]:
        print(f"  absent   {absent['what']}: {absent['why']}")
    for line in run.warnings:
        print(f"  warning  {line}")
    for f in run.findings():
        print(f"  {f.severity:8} {f.rule} {f.module} since {f.first_step}")


def main(names: list[str]) -> None:
    """Print what every client gives, in each way of training and of checkpointing."""
    torch.set_num_threads(1)
    for name in names or ALL:
        for kind in WAYS:
            for reentrant in (None, False, True):
                how = {} if reentrant is None else {"reentrant": reentrant}
                with tempfile.TemporaryDirectory() as folder:
                    _tell(name, kind, Path(folder) / "run", **how)


if __name__ == "__main__":
    main(sys.argv[1:])
