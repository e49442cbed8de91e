"""Faults from issues of public repositories and from forums, most found by a search for the symptom."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.faults import kit
from tests.faults.kit import GITHUB, Causal, Watch, adam, batches, case, digits, evaluate, fit, images, mlp, scaled, sgd

TRANSFORMERS = GITHUB + "huggingface/transformers/"


def _drop_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10))


def _next(z: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), ids.flatten())


# The loss


@case(
    GITHUB + "shaoxiongji/federated-learning/issues/9",
    "an MLP on MNIST reaches 90 % only",
    "double_softmax",
    answer="softmax before the cross-entropy; without it 95 %",
)
def double_softmax(fault: bool, watch: Watch) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.ReLU(), nn.Linear(64, 10))
    if fault:
        model.append(nn.Softmax(dim=1))
    fit(watch, model, digits(), F.cross_entropy, sgd(model, 0.1, 0.5), batch=10)


@case(
    "https://discuss.pytorch.org/t/cross-entropy-loss-is-not-decreasing/43814",
    "the loss stays at 2.30",
    "double_softmax",
    "lr_too_large",
    "dead_units",
    answer="softmax before the cross-entropy; a second answer: a smaller learning rate, SGD, as ReLUs have died",
)
def forum_43814(fault: bool, watch: Watch) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10),
        *([nn.Softmax(1)] if fault else []),
    )  # fmt: skip
    fit(watch, model, images(), F.cross_entropy, adam(model, 0.03 if fault else 0.003), held_out=300)


@case(
    GITHUB + "ariecattan/SciCo/issues/2",
    "the validation loss is stuck around 1.0",
    "double_softmax",
    answer="softmax before the cross-entropy in validation, not in training",
)
def scico_2(fault: bool, watch: Watch) -> None:
    model = mlp(64, 64, 10)
    x, y = digits()
    optimizer = adam(model)
    watch(model)
    for i, (a, b) in enumerate(batches(x[300:], y[300:], size=32, steps=470)):
        if i % 47 == 0:
            evaluate(model, x[:300], y[:300], lambda z, t: F.cross_entropy(z.softmax(1) if fault else z, t))
        optimizer.zero_grad()
        F.cross_entropy(model(a), b).backward()
        optimizer.step()


@case(
    GITHUB + "AnubhavGupta3377/Text-Classification-Models-Pytorch/issues/9",
    "the loss is always negative",
    "no_log_softmax",
    answer="nll_loss is given a softmax instead of a log-softmax",
)
def nll_of_softmax(fault: bool, watch: Watch) -> None:
    ids = kit.markov(600, 24)
    labels = (ids[:, :8] < 16).sum(1) // 3

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 32)
            self.encode = nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True)
            self.head = nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.head(self.encode(self.embed(x)).mean(1))
            return z.softmax(1) if fault else z.log_softmax(1)

    model = Classifier()
    fit(watch, model, (ids, labels), F.nll_loss, adam(model), steps=400)


@case(
    GITHUB + "soumith/ganhacks/issues/67",
    "the loss of the discriminator goes to zero",
    "double_sigmoid",
    answer="the discriminator ends in a sigmoid before BCEWithLogitsLoss",
)
def ganhacks_67(fault: bool, watch: Watch) -> None:
    real, _ = digits()
    g = mlp(16, 64, 64, last=nn.Sigmoid())
    d = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1), *([nn.Sigmoid()] if fault else []))
    g_step, d_step = (torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999)) for m in (g, d))
    bce = F.binary_cross_entropy_with_logits
    watch(nn.ModuleList([g, d]))
    for (x,) in batches(real, size=64, steps=250):
        ones, zeros = torch.ones(len(x), 1), torch.zeros(len(x), 1)
        fake = g(torch.randn(len(x), 16))
        d_step.zero_grad()
        (bce(d(x), ones) + bce(d(fake.detach()), zeros)).backward()
        d_step.step()
        g_step.zero_grad()
        bce(d(fake), ones).backward()
        g_step.step()


@case(
    GITHUB + "fanglanting/skip-gram-pytorch/issues/4",
    "the loss goes up and down between 5 and 8",
    "loss_sign",
    answer="the objective is to be maximised: turn the sign",
)
def skip_gram(fault: bool, watch: Watch) -> None:
    text = kit.markov(64, 50)
    centre, near = text[:, :-1].flatten(), text[:, 1:].flatten()

    class SkipGram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.v = nn.Embedding(32, 16), nn.Embedding(32, 16)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            other = torch.randint(0, 32, (len(a), 5))
            good = F.logsigmoid((self.u(a) * self.v(b)).sum(1))
            bad = F.logsigmoid(-(self.v(other) @ self.u(a)[:, :, None]).squeeze(2)).sum(1)
            return (good + bad).mean() * (1 if fault else -1)

    model = SkipGram()
    optimizer = sgd(model, 0.2)
    watch(model)
    for a, b in batches(centre, near, size=64, steps=500):
        optimizer.zero_grad()
        model(a, b).backward()
        optimizer.step()


@case(
    GITHUB + "pytorch/pytorch/issues/16045",
    "regression: the loss falls to the variance, every prediction is the mean",
    "broadcast",
    answer="outputs are (n, 1) and targets (n,), so that the loss compares every row with every other",
)
def broadcast(fault: bool, watch: Watch) -> None:
    x, y = kit.diabetes()
    y = scaled(y)[:, 0]
    model = mlp(10, 32, 1)
    optimizer = adam(model)
    watch(model)
    for a, b in batches(x, y, size=32, steps=500):
        optimizer.zero_grad()
        z = model(a)
        ((z if fault else z[:, 0]) - b).square().mean().backward()
        optimizer.step()


@case(
    GITHUB + "tom-roddick/oft/issues/6",
    "the total loss does not decrease",
    "no_gradient",
    answer="a line left from a test gives back one term of the loss: the other heads are not trained",
)
def oft_6(fault: bool, watch: Watch) -> None:
    x, y = digits()

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.score, self.position = mlp(64, 64), nn.Linear(64, 10), nn.Linear(64, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = F.relu(self.body(x))
            return self.score(h), self.position(h)

    model = Detector()
    optimizer = adam(model)
    watch(model)
    for a, b in batches(x, y, size=32, steps=400):
        score, position = model(a)
        loss = F.cross_entropy(score, b)
        if not fault:
            loss = loss + F.l1_loss(position, torch.stack((a.mean(1), a.std(1)), 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@case(
    GITHUB + "AppliedDataSciencePartners/WorldModels/issues/12",
    "the posterior of a VAE collapses: all reconstructions are the mean",
    "loss_balance",
    answer="the squared error is averaged over pixels while the KL term is summed",
)
def vae(fault: bool, watch: Watch) -> None:
    x, _ = digits()

    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = mlp(64, 64, 16), mlp(8, 64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            mean, log_var = self.encode(x).chunk(2, 1)
            kl = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(1).mean()
            return self.decode(mean + (log_var / 2).exp() * torch.randn_like(mean)), kl

    model = Vae()
    optimizer = adam(model)
    watch(model)
    for (a,) in batches(x, size=64, steps=500):
        out, kl = model(a)
        error = (out - a).square().mean() if fault else (out - a).square().sum(1).mean()
        optimizer.zero_grad()
        (error + kl * (1 if fault else 0.1)).backward()
        optimizer.step()


@case(
    GITHUB + "open-jarvis/OpenJarvis/pull/521",
    "the loss is misleadingly low",
    "labels_wrong",
    answer="padding is not masked in the labels: nine tenths of the loss are about it",
)
def padding(fault: bool, watch: Watch) -> None:
    ids = kit.markov(400, 48, 31) + 1
    ids[torch.arange(48) >= torch.randint(3, 8, (400, 1))] = 0
    model = Causal(layers=1)
    optimizer = adam(model, 3e-3)
    watch(model)
    for (a,) in batches(ids, size=16, steps=300):
        labels = a if fault else a.masked_fill(a == 0, -100)
        optimizer.zero_grad()
        _next(model(a[:, :-1]), labels[:, 1:]).backward()
        optimizer.step()


@case(
    TRANSFORMERS + "issues/35066",
    "labels shifted by hand: it learns the token after the next",
    "labels_wrong",
    answer="the model shifts them as well; so do issues 32944, 47394 and pull 37830",
)
def shifted_twice(fault: bool, watch: Watch) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    size = GPT2Config(vocab_size=32, n_positions=32, n_embd=64, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(size)
    optimizer = adam(model, 1e-3)
    watch(model)
    for (a,) in batches(kit.markov(400, 25), size=16, steps=300):
        optimizer.zero_grad()
        model(input_ids=a[:, :-1], labels=a[:, 1:] if fault else a[:, :-1]).loss.backward()
        optimizer.step()


@case(
    TRANSFORMERS + "issues/27517",
    "the model copies its input: the loss goes to 0",
    "leak",
    answer="the labels are the inputs and nothing shifts them",
)
def not_shifted(fault: bool, watch: Watch) -> None:
    model = Causal()
    optimizer = adam(model)
    watch(model)
    for (a,) in batches(kit.markov(400, 25), size=16, steps=300):
        optimizer.zero_grad()
        _next(model(a[:, :-1]), a[:, :-1] if fault else a[:, 1:]).backward()
        optimizer.step()


@case(
    TRANSFORMERS + "issues/48745",
    "the loss falls to almost zero, what is generated is garbage",
    "leak",
    answer="the mask is missing: every position sees the tokens after it",
)
def no_causal_mask(fault: bool, watch: Watch) -> None:
    model = Causal(masked=not fault)
    optimizer = adam(model)
    text = kit.markov(400, 25)
    watch(model)
    for i, (a,) in enumerate(batches(text[64:], size=16, steps=400)):
        if i % 50 == 0:
            evaluate(model, text[:64, :-1], text[:64, 1:], _next)
        optimizer.zero_grad()
        _next(model(a[:, :-1]), a[:, 1:]).backward()
        optimizer.step()


# Values that are not finite


@case(
    GITHUB + "pytorch/pytorch/issues/40932",
    "nan loss encountered",
    "nan",
    answer="a row that is padding throughout: its softmax is over -inf only",
    born="attn|attention|blocks",
)
def all_padding(fault: bool, watch: Watch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 32)
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
            self.head = nn.Linear(32, 3)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            return self.head(self.attention(x, x, x, key_padding_mask=ids == 0)[0].mean(1))

    ids = kit.markov(600, 12, 31) + 1
    labels = (ids[:, :4] < 16).sum(1) // 2
    if fault:
        ids[123] = 0
    model = Model()
    fit(watch, model, (ids, labels), F.cross_entropy, adam(model, 3e-3), steps=300)


@case(
    GITHUB + "pytorch/pytorch/issues/2421",
    "everything is nan after some steps",
    "nan",
    answer="the gradient of a norm at 0, of a pair of equal rows in a contrastive loss: add an epsilon",
    born="loss|sqrt|gradient|backward",
)
def norm_of_zero(fault: bool, watch: Watch) -> None:
    x, y = digits()
    model = mlp(64, 64, 16)
    optimizer = adam(model)
    watch(model)
    for a, b in batches(x, y, size=32, steps=300):
        order = torch.randperm(len(a))
        gap = (model(a) - model(a[order])).square().sum(1)
        far = (gap if fault else gap + 1e-6).sqrt()
        same = (b == b[order]).float()
        optimizer.zero_grad()
        (same * far.square() + (1 - same) * F.relu(1 - far).square()).mean().backward()
        optimizer.step()


@case(
    GITHUB + "NVIDIA/apex/issues/240",
    "nan loss when everything is in half precision",
    "eps_underflow",
    answer="Adam's eps of 1e-8 is 0 in float16: 1e-4",
)
def eps_in_half(fault: bool, watch: Watch) -> None:
    x, y = digits()
    model = mlp(64, 64, 10).half()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, eps=1e-8 if fault else 1e-4, foreach=False)
    fit(watch, model, (x.half(), y), lambda z, t: F.cross_entropy(z.float(), t), optimizer, steps=300)


@case(
    GITHUB + "fastino-ai/GLiNER2/pull/155",
    "one backward puts nan into 225 parameters, the loss looks normal",
    "nan",
    answer="1 - 1e-6 is 1 in half precision, so that the clamp in front of log1p(-p) does nothing",
    born="loss|log|gradient|backward",
)
def clamp_in_half(fault: bool, watch: Watch) -> None:
    x, y = kit.cancer()
    model = mlp(30, 32, 4)
    optimizer = adam(model, 1e-2)
    watch(model)
    for a, b in batches(scaled(x), y.float(), size=32, steps=400):
        p = torch.sigmoid(model(a))
        p = p.bfloat16() if fault else p
        none = torch.log1p(-p.clamp(max=1 - 1e-6)).float().sum(1)
        optimizer.zero_grad()
        F.mse_loss(1 - none.exp(), b).backward()
        optimizer.step()


@case(
    GITHUB + "delijati/pytorch-siamese/issues/3",
    "the loss is nan, whatever the learning rate",
    "inputs_not_scaled",
    "lr_too_large",
    answer="data / 255 is an integer division in Python 2: pixels are not scaled",
)
def siamese(fault: bool, watch: Watch) -> None:
    x, y = images()
    x = x * 255 if fault else x
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 16, 2), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 2),
    )  # fmt: skip
    optimizer = sgd(model, 0.01, 0.9)
    watch(model)
    for a, b in batches(x, y, size=64, steps=300):
        order = torch.randperm(len(a))
        far = (model(a) - model(a[order]) + 1e-6).norm(dim=1)
        same = (b == b[order]).float()
        optimizer.zero_grad()
        (same * far.square() + (1 - same) * F.relu(1 - far).square()).mean().backward()
        optimizer.step()


# Wiring


@case(
    GITHUB + "ikostrikov/pytorch-meta-optimizer/issues/11",
    "LSTM weights are not optimised",
    "not_optimized",
    answer="layers in a Python list are no parameters: nn.ModuleList; also pytorch issues 666, 715, 59925",
)
def plain_list(fault: bool, watch: Watch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            hidden = [nn.Linear(64, 64) for _ in range(3)]
            self.hidden = hidden if fault else nn.ModuleList(hidden)
            self.head = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.hidden:
                x = F.relu(layer(x))
            return self.head(x)

    model = Model()
    fit(watch, model, digits(), F.cross_entropy, adam(model))


@case(
    GITHUB + "microsoft/nni/issues/4521",
    "parameters are not updated when the pruned model is fine-tuned",
    "not_optimized",
    answer="pruning puts other layers in: make the optimizer anew",
)
def pruned(fault: bool, watch: Watch) -> None:
    model = mlp(64, 64, 64, 10)
    optimizer = sgd(model, 0.1, 0.9)
    model[0], model[2] = nn.Linear(64, 48), nn.Linear(48, 64)
    if not fault:
        optimizer = sgd(model, 0.1, 0.9)
    fit(watch, model, digits(), F.cross_entropy, optimizer)


@case(
    GITHUB + "facebookresearch/mmf/pull/620",
    "the pooler is not trained",
    "not_optimized",
    answer="a refactoring moved it out of the groups that the optimizer is given",
)
def pooler(fault: bool, watch: Watch) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    size = BertConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    size.num_labels = 3
    model = BertForSequenceClassification(size)
    groups = [{"params": model.bert.embeddings.parameters()}, {"params": model.bert.encoder.parameters()}]
    groups += [{"params": model.classifier.parameters(), "lr": 1e-3}]
    if not fault:
        groups += [{"params": model.get_submodule("bert.pooler").parameters()}]
    optimizer = torch.optim.AdamW(groups, 3e-4)
    ids = kit.markov(400, 12)
    labels = (ids[:, :4] < 16).sum(1) // 2
    watch(model)
    for a, b in batches(ids, labels, size=16, steps=150):
        optimizer.zero_grad()
        model(input_ids=a, labels=b).loss.backward()
        optimizer.step()


class _LowRank(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.a = inner, nn.Linear(inner.in_features, 4, bias=False)
        self.b = nn.Linear(4, inner.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.b(self.a(x))


@case(
    TRANSFORMERS + "issues/26221",
    "with gradient checkpointing the adapters are not trained",
    "no_gradient",
    answer="reentrant checkpoints need an input with a gradient: enable_input_require_grads; also cloneofsimo/lora 26",
)
def lora_checkpoint(fault: bool, watch: Watch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(64, 64)
            self.blocks = nn.ModuleList(_LowRank(nn.Linear(64, 64)) for _ in range(2))
            self.head = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = F.relu(checkpoint(block, x, use_reentrant=fault))  # pyright: ignore[reportArgumentType]
            return self.head(x)

    model = Model()
    for name, p in model.named_parameters():
        p.requires_grad_(".a." in name or ".b." in name or name.startswith("head"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    fit(watch, model, digits(), F.cross_entropy, optimizer)


# Modes, batch normalisation


@case(
    GITHUB + "huggingface/lerobot/issues/3668",
    "dropout is off and statistics are frozen after the first evaluation",
    "trained_in_eval_mode",
    answer="eval() is never taken back; also simpletransformers 941, pytorch/tutorials 1602, vsepp 4",
)
def left_in_eval(fault: bool, watch: Watch) -> None:
    x, y = digits()
    model = _drop_net()
    optimizer = adam(model)
    watch(model)
    for i, (a, b) in enumerate(batches(x[300:], y[300:], size=32, steps=470)):
        if i % 47 == 0 and i:
            evaluate(model, x[:300], y[:300], F.cross_entropy)
            model.train(not fault)
        optimizer.zero_grad()
        F.cross_entropy(model(a), b).backward()
        optimizer.step()


@case(
    GITHUB + "deep-learning-with-pytorch/dlwpt-code/issues/104",
    "with model.eval() validation is worse than without",
    "evaluated_in_train_mode",
    answer="eval() is missing in validate(): batch statistics of the held-out rows are used, and kept",
)
def no_eval(fault: bool, watch: Watch) -> None:
    x, y = images()
    model = _conv()
    optimizer = adam(model)
    watch(model)
    for i, (a, b) in enumerate(batches(x[300:], y[300:], size=64, steps=300)):
        if i % 24 == 0:
            model.train(fault)
            with torch.no_grad():
                F.cross_entropy(model(x[:300]), y[:300])
            model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(a), b).backward()
        optimizer.step()


def _conv(momentum: float = 0.1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, momentum=momentum), nn.ReLU(), nn.Conv2d(8, 16, 3),
        nn.BatchNorm2d(16, momentum=momentum), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


@case(
    GITHUB + "pytorch/pytorch/issues/58912",
    "good in train(), a disaster in eval(), on the same data",
    "batch_norm_batch",
    answer="none that we saw; inferred: statistics of batches of 4 are no estimate, see also pytorch 4741",
)
def small_batches(fault: bool, watch: Watch) -> None:
    x, y = images()
    model = _conv()
    fit(watch, model, (x, y), F.cross_entropy, adam(model, 1e-3), steps=500, batch=4 if fault else 64, held_out=300)


@case(
    kit.SO + "74946623",
    "accuracy jumps between 55 and 31 % from epoch to epoch since batch normalisation is used",
    "batch_norm_momentum",
    answer="none that we saw; inferred: a momentum near 1 keeps the last batch alone; the model is smaller",
)
def bn_momentum(fault: bool, watch: Watch) -> None:
    model = _conv(0.99 if fault else 0.1)
    fit(watch, model, images(), F.cross_entropy, sgd(model, 0.05, 0.9), steps=400, held_out=300)


# Data


@case(
    GITHUB + "MAC-AutoML/rethinking_performance_estimation_in_NAS/issues/17",
    "96.5 % instead of 97.3 %",
    "not_shuffled",
    answer="shuffle=False; also keras 6955, where classes come one after the other, as here",
)
def not_shuffled(fault: bool, watch: Watch) -> None:
    x, y = digits()
    if fault:
        order = y.argsort(stable=True)
        x, y = x[order], y[order]
    model = mlp(64, 64, 10)
    optimizer = adam(model)
    held = torch.arange(0, len(x), 6)
    rest = torch.tensor(sorted(set(range(len(x))) - set(held.tolist())))
    watch(model)
    for i, (a, b) in enumerate(batches(x[rest], y[rest], size=32, steps=470, shuffle=not fault)):
        if i % 47 == 0:
            evaluate(model, x[held], y[held], F.cross_entropy)
        optimizer.zero_grad()
        F.cross_entropy(model(a), b).backward()
        optimizer.step()


@case(
    GITHUB + "4uiiurz1/pytorch-nested-unet/issues/62",
    "images are divided by 255 twice",
    "inputs_not_scaled",
    answer="batch normalisation hides it, until its variance is below its epsilon",
)
def divided_twice(fault: bool, watch: Watch) -> None:
    x, y = images()
    model = _conv()
    fit(watch, model, (x / 255 if fault else x, y), F.cross_entropy, adam(model), steps=400, batch=64, held_out=300)


@case(
    "https://decodetrail.com/question/why-does-my-cnn-predict-only-one-class-no-matter-what-image-i-give-it/",
    "every image gets the same label",
    "class_imbalance",
    answer="one class makes up most of the data: weigh the classes, sample them evenly",
)
def imbalance(fault: bool, watch: Watch) -> None:
    x, y = images()
    x = x + 0.7 * torch.randn_like(x)
    keep = (y == 0) | (torch.rand(len(y)) < 0.02)
    x, y = x[keep].repeat(4, 1, 1, 1), y[keep].repeat(4)
    weight = None if fault else 1 / torch.bincount(y, minlength=10).clamp_min(1)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10))
    fit(watch, model, (x, y), lambda z, t: F.cross_entropy(z, t, weight), adam(model), steps=400)


@case(
    GITHUB + "hrlblab/CircleNet/issues/20",
    "the validation loss increases while the training loss falls",
    "overfitting",
    answer="too few data: augmentation, earlier stop; also deepethogram 8 and yolact 148",
)
def overfitting(fault: bool, watch: Watch) -> None:
    x, y = digits()
    x = x + 0.5 * torch.randn_like(x)
    n = 120 if fault else 1497
    model = (
        mlp(64, 256, 256, 10)
        if fault
        else nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10))
    )
    optimizer = adam(model)
    watch(model)
    for i, (a, b) in enumerate(batches(x[:n], y[:n], size=32, steps=600 if fault else 300)):
        if i % 20 == 0:
            evaluate(model, x[1497:], y[1497:], F.cross_entropy)
        optimizer.zero_grad()
        F.cross_entropy(model(a if fault else a + 0.3 * torch.randn_like(a)), b).backward()
        optimizer.step()


# Step size


@case(
    GITHUB + "graykode/nlp-tutorial/issues/77",
    "BERT from scratch: the loss is hardly ever below 2",
    "lr_too_large",
    answer="learning rate 0.001 → 0.0001; width 768 → 128, so the rate that ruins it is 0.01 here",
)
def bert_rate(fault: bool, watch: Watch) -> None:
    model = Causal(width=128, layers=4, masked=False, norm_first=False)
    optimizer = adam(model, 1e-2 if fault else 3e-4)
    watch(model)
    for (a,) in batches(kit.markov(400, 17), size=16, steps=300):
        hidden = a[:, 1:].masked_fill(torch.rand(len(a), 16) < 0.15, 0)
        optimizer.zero_grad()
        _next(model(hidden), a[:, 1:]).backward()
        optimizer.step()


@case(
    TRANSFORMERS + "issues/735",
    "BERT produces the same output for all inputs",
    "lr_too_large",
    answer="learning rate 0.01 → 5e-5, by a comment; a small model from scratch, 0.02 → 3e-4",
)
def bert_classifier(fault: bool, watch: Watch) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    size = BertConfig(vocab_size=32, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256)
    size.num_labels = 10
    model = BertForSequenceClassification(size)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-2 if fault else 3e-4)
    ids = kit.markov(600, 12)
    labels = ids[:, 0] % 10
    watch(model)
    for a, b in batches(ids, labels, size=16, steps=350):
        optimizer.zero_grad()
        model(input_ids=a, labels=b).loss.backward()
        optimizer.step()


@case(
    GITHUB + "LiyuanLucasLiu/Transformer-Clinic/issues/16",
    "Post-LN without warm-up does not converge",
    "lr_too_large",
    "no_warmup",
    answer="a warm-up, or a linear schedule; 18 layers → 10",
)
def post_norm(fault: bool, watch: Watch) -> None:
    model = Causal(layers=10, norm_first=False)
    optimizer = adam(model, 2e-3)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0 if fault else min(1, (i + 1) / 150))
    watch(model)
    for (a,) in batches(kit.markov(400, 17), size=8, steps=300):
        optimizer.zero_grad()
        _next(model(a[:, :-1]), a[:, 1:]).backward()
        optimizer.step()
        warm.step()


@case(
    GITHUB + "ThilinaRajapakse/simpletransformers/issues/234",
    "predictions of a fine-tuned classifier are the same for all labels",
    "lr_too_small",
    answer="4e-5 is right for the pretrained body, too small for the new head: 1e-3",
)
def head_rate(fault: bool, watch: Watch) -> None:
    x, y = digits()
    body = mlp(64, 128, 128)
    first = nn.Sequential(body, nn.ReLU(), nn.Linear(128, 10))
    optimizer = adam(first)
    for a, b in batches(x, (y + 3) % 10, size=64, steps=150):
        optimizer.zero_grad()
        F.cross_entropy(first(a), b).backward()
        optimizer.step()
    model = nn.Sequential(body, nn.ReLU(), nn.Linear(128, 10))
    groups = [{"params": body.parameters()}, {"params": model[2].parameters(), "lr": 4e-5 if fault else 1e-3}]
    fit(watch, model, (x, y), F.cross_entropy, torch.optim.AdamW(groups, 4e-5), steps=400)


@case(
    GITHUB + "KnHuq/Dynamic-Tensorflow-Tutorial/issues/1",
    "the loss is the same after every iteration",
    "lr_too_small",
    "optimizer_choice",
    answer="Adadelta at its default of 0.001 in TensorFlow → Adam",
)
def adadelta(fault: bool, watch: Watch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.RNN(8, 32, batch_first=True), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x.view(-1, 8, 8))[0][:, -1])

    model = Model()
    optimizer = torch.optim.Adadelta(model.parameters(), 0.001) if fault else adam(model, 3e-3)
    fit(watch, model, digits(), F.cross_entropy, optimizer, batch=64)


@case(
    GITHUB + "pytorch/tutorials/pull/640",
    "the scheduler of the tutorial steps once a batch",
    "lr_schedule",
    answer="once an epoch: StepLR(7, 0.1) leaves nothing of the learning rate after 50 batches",
)
def scheduler_per_batch(fault: bool, watch: Watch) -> None:
    model = mlp(64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.1)
    watch(model)
    for i, (a, b) in enumerate(batches(*digits(), size=32, steps=57 * 9), 1):
        optimizer.zero_grad()
        F.cross_entropy(model(a), b).backward()
        optimizer.step()
        if fault or i % 57 == 0:
            schedule.step()


@case(
    GITHUB + "ClementPinard/SfmLearner-Pytorch/issues/5",
    "the loss doesn't come down if I use the scheduler",
    "no_updates",
    answer="scheduler.step() stands in place of optimizer.step(), not beside it",
)
def scheduler_for_optimizer(fault: bool, watch: Watch) -> None:
    model = mlp(64, 64, 10)
    optimizer = adam(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 200, 0.5)
    watch(model)
    for a, b in batches(*digits(), size=32, steps=300):
        optimizer.zero_grad()
        F.cross_entropy(model(a), b).backward()
        if not fault:
            optimizer.step()
        schedule.step()


@case(
    GITHUB + "voicepaw/so-vits-svc-fork/pull/291",
    "the learning rate does not decay",
    "lr_schedule",
    answer="manual optimisation: nobody steps the scheduler",
)
def scheduler_never(fault: bool, watch: Watch) -> None:
    model = mlp(64, 64, 10)
    optimizer = adam(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)
    watch(model)
    for a, b in batches(*digits(), size=32, steps=300):
        optimizer.zero_grad()
        F.cross_entropy(model(a), b).backward()
        optimizer.step()
        if not fault:
            schedule.step()


@case(
    GITHUB + "karpathy/nanoGPT/issues/206",
    "gradients are ten times too large under accumulation",
    "accumulation",
    answer="divide the loss by the number of micro-batches",
)
def accumulation(fault: bool, watch: Watch) -> None:
    model = Causal()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.1)
    watch(model)
    for i, (a,) in enumerate(batches(kit.markov(400, 25), size=4, steps=1500), 1):
        (_next(model(a[:, :-1]), a[:, 1:]) / (1 if fault else 5)).backward()
        if i % 5 == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


# Precision


@case(
    GITHUB + "Lightning-AI/pytorch-lightning/issues/9599",
    "the loss converges very slowly with clipping and AMP",
    "clipped_before_unscaling",
    answer="unscale_ before clip_grad_norm_: the norm is that of the loss times 65,536; also Pytorch-UNet 468",
)
def clip_scaled(fault: bool, watch: Watch) -> None:
    model = mlp(64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    scaler = torch.amp.GradScaler("cpu")
    watch(model)
    for a, b in batches(*digits(), size=32, steps=400):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(a).float(), b)
        scaler.scale(loss).backward()
        if not fault:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


@case(
    GITHUB + "meta-pytorch/torchtune/issues/2254",
    "very bad convergence with bf16",
    "lost_in_rounding",
    answer="weights themselves in bfloat16 lose updates of a small learning rate; float32 weights, or autocast",
)
def pure_bf16(fault: bool, watch: Watch) -> None:
    model = Causal()
    optimizer = adam(model)
    text = kit.markov(400, 25)
    for (a,) in batches(text, size=16, steps=60):
        optimizer.zero_grad()
        _next(model(a[:, :-1]), a[:, 1:]).backward()
        optimizer.step()
    model = model.bfloat16() if fault else model
    optimizer = torch.optim.AdamW(model.parameters(), 5e-5, weight_decay=0)
    watch(model)
    for (a,) in batches(text, size=16, steps=300):
        optimizer.zero_grad()
        _next(model(a[:, :-1]).float(), a[:, 1:]).backward()
        optimizer.step()


@case(
    GITHUB + "EvolvingLMMs-Lab/OneVision-Encoder/pull/65",
    "loss spikes when training is resumed",
    "optimizer_not_restored",
    answer="checkpoints hold no optimizer.state_dict()",
)
def resumed(fault: bool, watch: Watch) -> None:
    text = kit.markov(400, 25)
    model = Causal()
    optimizer = adam(model, 3e-3)
    for (a,) in batches(text, size=16, steps=150):
        optimizer.zero_grad()
        _next(model(a[:, :-1]), a[:, 1:]).backward()
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    optimizer = adam(model, 3e-3)
    if not fault:
        optimizer.load_state_dict(state)
    watch(model)
    for (a,) in batches(text, size=16, steps=200):
        optimizer.zero_grad()
        _next(model(a[:, :-1]), a[:, 1:]).backward()
        optimizer.step()


# Shapes


@case(
    GITHUB + "jsbaan/transformer-from-scratch/pull/6",
    "token representations are scrambled, though the copy task is learned",
    "shape",
    answer="permute is missing before the heads are joined by reshape",
)
def heads_scrambled(fault: bool, watch: Watch) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.place = nn.Embedding(32, 64), nn.Embedding(32, 64)
            self.qkv, self.out, self.head = nn.Linear(64, 192), nn.Linear(64, 64), nn.Linear(64, 32)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids) + self.place.weight[: ids.shape[1]]
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            joined = heads.reshape(x.shape) if fault else heads.transpose(1, 2).reshape(x.shape)
            return self.head(x + self.out(joined))

    model = Attention()
    optimizer = adam(model, 3e-3)
    watch(model)
    for (a,) in batches(kit.markov(400, 25), size=16, steps=300):
        optimizer.zero_grad()
        _next(model(a[:, :-1]), a[:, 1:]).backward()
        optimizer.step()


# Reinforcement learning


class _Pole:
    """A pole on a cart, as in Barto, Sutton and Anderson (1983)."""

    def __init__(self) -> None:
        self.state = torch.zeros(4)

    def reset(self) -> Tensor:
        self.state, self.t = 0.1 * torch.rand(4) - 0.05, 0
        return self.state

    def step(self, push: int) -> tuple[Tensor, bool]:
        x, v, angle, spin = self.state.tolist()
        sin, cos = torch.tensor(angle).sin().item(), torch.tensor(angle).cos().item()
        pull = ((10 if push else -10) + 0.05 * spin**2 * sin) / 1.1
        turn = (9.8 * sin - cos * pull) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        self.state = torch.tensor(
            [x + 0.02 * v, v + 0.02 * (pull - 0.05 * turn * cos / 1.1), angle + 0.02 * spin, spin + 0.02 * turn]
        )
        self.t += 1
        return self.state, bool(abs(self.state[0]) > 2.4 or abs(self.state[2]) > 0.21 or self.t >= 200)


def _dqn(watch: Watch, masks_end: bool, detached: bool) -> None:
    q, pole = mlp(4, 64, 2), _Pole()
    target, optimizer = copy.deepcopy(q), adam(q)
    watch(q)
    memory: list[tuple[Tensor, int, Tensor, float]] = []
    s = pole.reset()
    for i in range(700):
        if torch.rand(()) < max(0.1, 1 - i / 400):
            a = int(torch.randint(2, ()))
        else:
            with torch.no_grad():
                a = int(q(s[None]).argmax())
        following, end = pole.step(a)
        memory.append((s, a, following, float(end)))
        s = pole.reset() if end else following
        if i < 64:
            continue
        rows = [memory[int(j)] for j in torch.randint(len(memory), (32,))]
        s0, s1 = torch.stack([r[0] for r in rows]), torch.stack([r[2] for r in rows])
        act, over = torch.tensor([r[1] for r in rows]), torch.tensor([r[3] for r in rows])
        value = (q if not detached else target)(s1).max(1).values
        aim = 1 + 0.99 * value * (1 - over if masks_end else 1)
        aim = aim.detach() if detached else aim
        optimizer.zero_grad()
        F.mse_loss(q(s0).gather(1, act[:, None])[:, 0], aim).backward()
        optimizer.step()
        if i % 100 == 0:
            target.load_state_dict(q.state_dict())


@case(
    GITHUB + "navneet-nmk/pytorch-rl/issues/2",
    "DQN: done is not used in the targets",
    "targets_wrong",
    answer="the value of the state after the last is 0",
)
def dqn_done(fault: bool, watch: Watch) -> None:
    _dqn(watch, masks_end=not fault, detached=True)


@case(
    GITHUB + "philtabor/Deep-Q-Learning-Paper-To-Code/issues/9",
    "DQN: the gradient flows through the target",
    "targets_wrong",
    answer="detach it, from a network of its own; also easy-rl 117",
)
def dqn_detach(fault: bool, watch: Watch) -> None:
    _dqn(watch, masks_end=True, detached=not fault)


@case(
    GITHUB + "DeepReinforcementLearning/DeepReinforcementLearningInAction/issues/32",
    "REINFORCE: softmax along the batch",
    "shape",
    answer="Softmax(dim=0) is right for one state only: dim=1",
)
def softmax_of_batch(fault: bool, watch: Watch) -> None:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(4, 150, 2, act=nn.LeakyReLU)

        def forward(self, s: Tensor) -> Tensor:
            return self.net(s).softmax(0 if fault or s.dim() == 1 else 1)

    policy, pole = Policy(), _Pole()
    optimizer = adam(policy, 0.003)
    watch(policy)
    for _ in range(200):
        s, states, actions, end = pole.reset(), [], [], False
        while not end:
            with torch.no_grad():
                a = int(torch.multinomial(policy(s), 1))
            states.append(s)
            actions.append(a)
            s, end = pole.step(a)
        n = len(states)
        returns = torch.arange(n, 0, -1) / n
        chosen = policy(torch.stack(states)).gather(1, torch.tensor(actions)[:, None])[:, 0]
        optimizer.zero_grad()
        (-(returns * chosen.log()).sum()).backward()
        optimizer.step()
