"""Programs of the published fault benchmarks.

DeepLocalize and DeepFD: programs from Stack Overflow, most in Keras, with the patch that DeepFD's authors verified.
Left out are those which the authors themselves call no fault (41372874, 34673164, 51930566, 50481178, 41327601,
39810655), those whose data or code are not shown (56380303, 59282996, 58237726, 41977498, 41947039, 58609115, 45337371,
41600519), and whole projects. The posts themselves were not read: symptoms are those of the programs. Of 37624102,
42514960, 42800203, 44998910, 46642627, 46995209, 47932589, 51181393 and 37213388 only DeepFD's patch was seen: layers,
rates and data that it does not show are ours, of the kind that it names. TheDeepChecker: its Stack Overflow programs
but IPS_12, whose fault is not told, and three of TensorFlow-Examples (a fourth is IPS_14 again); its other GitHub
programs are whole projects. UMLAUT: eval_a; eval_b has a negative learning rate, which torch refuses. TrainCheck: what
needs neither two accelerators nor an old release. Data are digits for MNIST and CIFAR-10, other tables of scikit-learn
for files.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults import kit
from tests.faults.kit import CHECKER, GITHUB, SO, Watch, adam, case, digits, fit, images, mlp, scaled, sgd

TENSORFLOW_EXAMPLES = GITHUB + "aymericdamien/TensorFlow-Examples (TheDeepChecker, "

# DeepLocalize, DeepFD


@case(
    SO + "48385830",
    "accuracy stays near 10 %",
    "no_activation",
    "wrong_loss",
    "lr_too_large",
    answer="no activations and a squared error, at a learning rate of 3; 28×28 → 8×8",
)
def so_48385830(fault: bool, watch: Watch) -> None:
    x, y = digits()
    if fault:
        model = kit.drawn(nn.Sequential(nn.Linear(64, 30), nn.Linear(30, 10)), 1, also_bias=True)
        fit(watch, model, (x, kit.one_hot(y)), F.mse_loss, sgd(model, 3.0), batch=10)
    else:
        model = kit.drawn(mlp(64, 30, 10, act=nn.Sigmoid), 1, also_bias=True)
        fit(watch, model, (x, y), F.cross_entropy, sgd(model, 3.0), batch=10)


@case(
    SO + "44164749",
    "accuracy is low after 5 epochs",
    "lr_too_small",
    "too_few_steps",
    answer="learning rate 0.01 → 0.05, more epochs; widths 5000, 600 → 500, 60, batch 2000 → 200",
)
def so_44164749(fault: bool, watch: Watch) -> None:
    model = nn.Sequential(
        nn.Linear(64, 500),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(500, 60),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(60, 10),
    )
    optimizer = sgd(model, 0.01 if fault else 0.05, 0.9)
    fit(watch, model, digits(), F.cross_entropy, optimizer, steps=40 if fault else 300, batch=200)


@case(
    SO + "31556268",
    "XOR is not learned in 1,000 epochs",
    "wrong_loss",
    "lr_too_small",
    "too_few_steps",
    answer="squared instead of absolute error, higher learning rate, 50 times the epochs (here: rate and momentum up)",
)
def so_31556268(fault: bool, watch: Watch) -> None:
    model = mlp(2, 4, 1, act=nn.Sigmoid, last=nn.Sigmoid())
    if fault:
        fit(watch, model, kit.xor(), F.l1_loss, sgd(model, 0.05, 0.11), steps=1000, batch=4)
    else:
        fit(watch, model, kit.xor(), F.mse_loss, sgd(model, 1.0, 0.9), steps=1500, batch=4)


@case(
    SO + "50306988",
    "predicts one of two separable classes only",
    "lr_too_small",
    "too_few_steps",
    answer="learning rate 0.001 → 0.01 and more epochs",
)
def so_50306988(fault: bool, watch: Watch) -> None:
    low, high = 0.2 + 0.2 * torch.rand(100, 2), 0.5 + 0.2 * torch.rand(100, 2)
    data = torch.cat((low, high)), torch.arange(200) // 100
    model = mlp(2, 2, 2, act=nn.Sigmoid)
    fit(watch, model, data, F.cross_entropy, adam(model, 1e-3 if fault else 1e-2), steps=35 if fault else 700)


@case(
    SO + "48251943",
    "the prediction is 0 for every row",
    "output_activation",
    "dead_units",
    answer="a ReLU after the last layer cannot give what is asked for: tanh or nothing",
)
def so_48251943(fault: bool, watch: Watch) -> None:
    x = torch.randn(100, 2)
    y = torch.tanh(x @ torch.tensor([[0.7], [-0.4]])) - 0.5
    model = mlp(2, 4, 1, last=nn.ReLU() if fault else nn.Tanh())
    fit(watch, model, (x, y), F.mse_loss, sgd(model, 0.01), batch=10)


@case(
    SO + "38648195",
    "several labels a row: accuracy does not move",
    "output_activation",
    "wrong_loss",
    answer="softmax and squared error → sigmoid and binary cross-entropy",
)
def so_38648195(fault: bool, watch: Watch) -> None:
    x = torch.randn(2000, 20)
    y = (x @ torch.randn(20, 3) > 0).float()
    body = [nn.Linear(20, 20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 20), nn.ReLU(), nn.Dropout(0.5)]
    if fault:
        model = nn.Sequential(*body, nn.Linear(20, 3), nn.Softmax(1))
        fit(watch, model, (x, y), F.mse_loss, sgd(model, 0.01), batch=20, held_out=400)
    else:
        model = nn.Sequential(*body, nn.Linear(20, 3))
        fit(watch, model, (x, y), F.binary_cross_entropy_with_logits, sgd(model, 0.1), batch=20, held_out=400)


@case(
    SO + "33969059",
    "a linear function is not learned, the output is always 1",
    "single_softmax",
    "inputs_not_scaled",
    answer="softmax over one output is 1; the answer takes it away and scales the inputs, which go to 10,000",
)
def so_33969059(fault: bool, watch: Watch) -> None:
    x = 10000 * torch.rand(2000, 3)
    y = x @ torch.tensor([[2.0], [1], [0.5]]) + 2.2
    if fault:
        model = mlp(3, 3, 2, 1, act=nn.Tanh, last=nn.Softmax(1))
        fit(watch, model, (x, y), F.mse_loss, sgd(model, 0.1, 0.9))
    else:
        model = mlp(3, 3, 2, 1, act=nn.Tanh)
        fit(watch, model, (scaled(x), scaled(y)), F.mse_loss, sgd(model, 0.01, 0.9))


@case(
    SO + "55328966",
    "accuracy stays at 10 %",
    "inputs_not_scaled",
    "output_activation",
    "lr_too_small",
    answer="divide pixels by 255; sigmoid before the cross-entropy → softmax; Adam for gradient descent at 1e-4",
)
def so_55328966(fault: bool, watch: Watch) -> None:
    x, y = digits()
    if fault:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10), nn.Sigmoid())
        fit(watch, model, (x * 255, y), F.cross_entropy, sgd(model, 1e-4))
    else:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
        fit(watch, model, (x, y), F.cross_entropy, adam(model))


@case(
    SO + "34311586",
    "XOR: all four outputs are 1",
    "single_softmax",
    "lr_too_small",
    answer="softmax over one output → sigmoid; Adam, more epochs",
)
def so_34311586(fault: bool, watch: Watch) -> None:
    if fault:
        model = mlp(2, 2, 3, 1, act=nn.Sigmoid, last=nn.Softmax(1))
        fit(watch, model, kit.xor(), F.mse_loss, sgd(model, 1e-3, 0.9))
    else:
        model = mlp(2, 8, 8, 1, act=nn.Tanh, last=nn.Sigmoid())
        fit(watch, model, kit.xor(), F.mse_loss, adam(model, 1e-2))


@case(
    SO + "31880720",
    "accuracy is 0.5 on two constant vectors",
    "single_softmax",
    answer="softmax over one output → sigmoid",
)
def so_31880720(fault: bool, watch: Watch) -> None:
    x = torch.cat((torch.ones(500, 128), torch.zeros(500, 128)))
    y = x[:, :1].clone()
    body = [nn.Linear(128, 50), nn.ReLU(), nn.Dropout(0.2), nn.Linear(50, 50), nn.ReLU(), nn.Dropout(0.2)]
    model = nn.Sequential(*body, nn.Linear(50, 1), nn.Softmax(1) if fault else nn.Sigmoid())
    fit(watch, model, (x, y), F.binary_cross_entropy, torch.optim.RMSprop(model.parameters(), 1e-3), held_out=200)


@case(
    SO + "39525358",
    "accuracy does not change over 150 epochs",
    "inputs_not_scaled",
    "lr_too_small",
    "output_activation",
    answer="scale the inputs, raise the learning rate; the file is not shown: three columns of breast cancer",
)
def so_39525358(fault: bool, watch: Watch) -> None:
    x, y = kit.cancer()
    x, y = x[:, [2, 3, 22]], y[:, None].float()
    model = mlp(3, 12, 3, 1, last=nn.Sigmoid())
    for p in model.parameters():
        nn.init.uniform_(p, -0.05, 0.05)
    fit(
        watch,
        model,
        (x if fault else scaled(x), y),
        F.binary_cross_entropy,
        adam(model, 1e-3 if fault else 1e-2),
        600,
        10,
    )


@case(
    SO + "39217567",
    "a permutation of 256 bytes is not memorised",
    "vanishing_gradients",
    "saturated_units",
    "activation",
    answer="three sigmoid layers begin with N(0, 0.05²) under SGD: ReLU; here with Adam, to be seen in 1,000 steps",
)
def so_39217567(fault: bool, watch: Watch) -> None:
    x = (torch.arange(256)[:, None] >> torch.arange(8) & 1).float()
    y = x[torch.randperm(256)]
    if fault:
        model = kit.drawn(mlp(8, 8, 8, 8, act=nn.Sigmoid, last=nn.Sigmoid()), 0.05)
        fit(watch, model, (x, y), F.mse_loss, sgd(model, 0.01), steps=1000, batch=50)
    else:
        model = mlp(8, 128, 128, 8, last=nn.Sigmoid())
        fit(watch, model, (x, y), F.mse_loss, adam(model, 3e-3), steps=1000, batch=50)


@case(SO + "48934338", "the loss is nan", "lr_too_large", answer="learning rate 0.1 → 0.0001")
def so_48934338(fault: bool, watch: Watch) -> None:
    x = torch.arange(0, 5, 0.1)[:, None]
    y = 5 * x**2 + torch.randn(50, 1) ** 3
    model = mlp(1, 50, 30, 1)
    fit(watch, model, (x, y), F.mse_loss, sgd(model, 0.1 if fault else 1e-4))


@case(
    SO + "47724077",
    "loss 11.9, accuracy 0.24 from the first epoch to the last",
    "inputs_not_scaled",
    answer="standardise the columns; wine for the census file",
)
def so_47724077(fault: bool, watch: Watch) -> None:
    x, y = kit.wine()
    model = mlp(13, 21, 3)
    fit(watch, model, (x if fault else scaled(x), y), F.cross_entropy, adam(model, 1e-3 if fault else 1e-2), batch=50)


@case(
    SO + "59325381",
    "training accuracy 1, test accuracy 0.1",
    "labels_wrong",
    answer="labels were divided by 255 like the pixels, so that all are class 0",
)
def so_59325381(fault: bool, watch: Watch) -> None:
    x, y = images()
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(16, 8, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    fit(watch, model, (x, (y / 255).long() if fault else y), F.cross_entropy, adam(model, 3e-3))


@case(
    SO + "59278771",
    "iris: accuracy around 0.33",
    "inputs_not_scaled",
    "output_activation",
    "activation",
    answer="standardise; sigmoid before the cross-entropy → softmax; ReLU → SELU",
)
def so_59278771(fault: bool, watch: Watch) -> None:
    x, y = kit.iris()
    if fault:
        model = kit.drawn(mlp(4, 4, 3, last=nn.Sigmoid()), 0.05)
        fit(watch, model, (x, y), F.cross_entropy, adam(model), steps=600, batch=5)
    else:
        model = mlp(4, 4, 3, act=nn.SELU)
        fit(watch, model, (scaled(x), y), F.cross_entropy, adam(model, 1e-2), steps=600, batch=5)


@case(
    SO + "52800582",
    "x⁴ on -100 to 100: the loss stays at 1e15",
    "inputs_not_scaled",
    "targets_not_scaled",
    answer="standardise x and y",
)
def so_52800582(fault: bool, watch: Watch) -> None:
    x = torch.arange(-100, 100, 0.5)[:, None]
    y = x**4
    model = nn.Sequential(nn.Linear(1, 50), nn.Sigmoid(), nn.Linear(50, 50), nn.ELU(), nn.Linear(50, 1))
    fit(watch, model, (x, y) if fault else (scaled(x), scaled(y)), F.mse_loss, adam(model), batch=400)


@case(
    SO + "48221692",
    "a straight line is not learned",
    "output_activation",
    answer="sigmoid after the last layer → nothing",
)
def so_48221692(fault: bool, watch: Watch) -> None:
    x = 4 * torch.rand(200, 1)
    model = mlp(1, 5, 1, act=nn.Sigmoid, last=nn.Sigmoid() if fault else None)
    fit(watch, model, (x, 2 * x + 1), F.mse_loss, sgd(model, 0.05), batch=150)


@case(
    SO + "50079585",
    "three kinds of images: accuracy 0.33, loss negative",
    "output_size",
    "output_activation",
    answer="one sigmoid output for labels 0, 1, 2 → three outputs, softmax; 150×150 → 8×8",
)
def so_50079585(fault: bool, watch: Watch) -> None:
    x, y = images(3)
    x, y = x[y < 3], y[y < 3]
    body = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    body += [nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5)]
    if fault:
        model = nn.Sequential(*body, nn.Linear(32, 1), nn.Flatten(0))
        optimizer = torch.optim.RMSprop(model.parameters(), 1e-3)
        fit(watch, model, (x, y.float()), F.binary_cross_entropy_with_logits, optimizer, batch=16, held_out=100)
    else:
        model = nn.Sequential(*body, nn.Linear(32, 3))
        optimizer = torch.optim.RMSprop(model.parameters(), 1e-3)
        fit(watch, model, (x, y), F.cross_entropy, optimizer, steps=300, batch=16, held_out=100)


@case(
    SO + "47352366",
    "accuracy stays at 0.1",
    "output_activation",
    "dead_units",
    answer="a ReLU before the cross-entropy → softmax; channels 32, 64, 1024 → 8, 16, 64",
)
def so_47352366(fault: bool, watch: Watch) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10),
        *([nn.ReLU()] if fault else []),
    )  # fmt: skip
    fit(watch, model, images(), F.cross_entropy, adam(model), steps=600, batch=50)


@case(
    SO + "45442843",
    "the loss does not change",
    "single_softmax",
    "wrong_loss",
    answer="squared error, Adam, an activation that is not a softmax over one output",
)
def so_45442843(fault: bool, watch: Watch) -> None:
    x = torch.randn(500, 1)
    y = (x > 0.3).float()
    if fault:
        model = mlp(1, 1, 1, act=nn.Sigmoid, last=nn.Softmax(1))
        fit(watch, model, (x, y), F.l1_loss, torch.optim.RMSprop(model.parameters(), 1e-3), batch=200, held_out=100)
    else:
        model = mlp(1, 1, 1, act=nn.Sigmoid, last=nn.Sigmoid())
        fit(watch, model, (x, y), F.mse_loss, adam(model, 3e-2), batch=200, held_out=100)


@case(SO + "48594888", "accuracy is low after 5 epochs", "too_few_steps", answer="train for longer, in smaller batches")
def so_48594888(fault: bool, watch: Watch) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10),
    )  # fmt: skip
    steps, batch = (20, 350) if fault else (400, 32)
    fit(watch, model, images(), F.cross_entropy, adam(model), steps=steps, batch=batch, held_out=300)


@case(
    SO + "31627380",
    "loss and accuracy do not change on Titanic",
    "optimizer_choice",
    "output_activation",
    "wrong_loss",
    answer="Adam → SGD, by DeepFD's patch; breast cancer for Titanic",
)
def so_31627380(fault: bool, watch: Watch) -> None:
    x, y = kit.cancer()
    model = nn.Sequential(nn.Linear(30, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 2))
    optimizer = adam(model) if fault else sgd(model, 0.01)
    fit(watch, model, (x if fault else scaled(x), y), F.cross_entropy, optimizer, batch=4, held_out=114)


@case(SO + "37624102", "the loss stays at 2.3", "lr_too_large", answer="learning rate 0.1 → 0.01 at momentum 0.9")
def so_37624102(fault: bool, watch: Watch) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.25),
        nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10),
    )  # fmt: skip
    fit(watch, model, images(), F.cross_entropy, sgd(model, 0.1 if fault else 0.01, 0.9), steps=700)


@case(
    SO + "44998910",
    "a sum of inputs is learned far too slowly",
    "lr_too_small",
    "too_few_steps",
    answer="learning rate 0.01 → 0.03 and more epochs",
)
def so_44998910(fault: bool, watch: Watch) -> None:
    x = torch.rand(300, 2)
    model = mlp(2, 2, 1, act=nn.Identity)
    fit(watch, model, (x, x.sum(1, keepdim=True)), F.mse_loss, sgd(model, 0.01 if fault else 0.3), 60 if fault else 600)


@case(
    SO + "46642627",
    "the loss is nan",
    "lr_too_large",
    "inputs_not_scaled",
    "targets_not_scaled",
    "wrong_loss",
    answer="scale inputs and targets, lower the learning rate",
)
def so_46642627(fault: bool, watch: Watch) -> None:
    x = 1000 * torch.rand(400, 4)
    y = x.sum(1, keepdim=True)
    model = mlp(4, 16, 1)
    fit(watch, model, (x, y) if fault else (scaled(x), scaled(y)), F.mse_loss, sgd(model, 0.01))


@case(
    SO + "46995209",
    "the same output for every row",
    "inputs_not_scaled",
    "saturated_units",
    "dead_units",
    "too_deep",
    answer="scale the inputs; tanh and eight narrow ReLU layers → fewer and wider ones",
)
def so_46995209(fault: bool, watch: Watch) -> None:
    x, y = kit.cancer()
    target = y[:, None].float()
    if fault:
        model = nn.Sequential(nn.Linear(30, 10), nn.Tanh(), nn.Linear(10, 90), nn.Tanh(), *mlp(90, *[10] * 8, 1))
        fit(watch, model, (x, target), F.mse_loss, adam(model))
    else:
        model = mlp(30, 25, 10, 1)
        fit(watch, model, (scaled(x), target), F.mse_loss, adam(model))


@case(
    SO + "51181393",
    "y = 2x is not learned in the given epochs",
    "lr_too_small",
    "too_few_steps",
    answer="learning rate of RMSprop 0.001 → 0.1",
)
def so_51181393(fault: bool, watch: Watch) -> None:
    x = torch.arange(0.0, 100)[:, None] / 10
    model = nn.Linear(1, 1)
    optimizer = torch.optim.RMSprop(model.parameters(), 1e-3 if fault else 0.1)
    fit(watch, model, (x, 20 * x + 5), F.mse_loss, optimizer)


@case(
    SO + "47932589",
    "the loss is in the millions and hardly falls",
    "inputs_not_scaled",
    "targets_not_scaled",
    answer="scale inputs and targets to [0, 1]",
)
def so_47932589(fault: bool, watch: Watch) -> None:
    x = 3000 * torch.rand(400, 1)
    y = 2 * x + 300 * torch.randn(400, 1)
    model = mlp(1, 20, 20, 1, act=nn.Tanh)
    fit(watch, model, (x, y) if fault else (x / 3000, y / 6000), F.mse_loss, adam(model))


@case(SO + "37213388", "blurred reconstructions", "too_few_steps", answer="2 → 10 epochs")
def so_37213388(fault: bool, watch: Watch) -> None:
    x, _ = digits()
    model = mlp(64, 32, 16, 32, 64, last=nn.Sigmoid())
    fit(watch, model, (x, x), F.binary_cross_entropy, adam(model), steps=2 * 15 if fault else 40 * 15, batch=128)


@case(SO + "42800203", "binary classes: accuracy 0.5", "single_softmax", answer="softmax over one output → sigmoid")
def so_42800203(fault: bool, watch: Watch) -> None:
    x, y = kit.cancer()
    model = mlp(30, 32, 1, last=nn.Softmax(1) if fault else nn.Sigmoid())
    fit(watch, model, (scaled(x), y[:, None].float()), F.binary_cross_entropy, adam(model))


@case(
    SO + "42514960",
    "an autoencoder gives zeros for negative inputs",
    "output_activation",
    "activation",
    "dead_units",
    answer="ReLU, also after the last layer → tanh",
)
def so_42514960(fault: bool, watch: Watch) -> None:
    x = scaled(kit.cancer()[0])[:, :10].clamp(-3, 3) / 3
    act = nn.ReLU if fault else nn.Tanh
    model = mlp(10, 20, 20, 4, 20, 20, 10, act=act, last=act())
    fit(watch, model, (x, x), F.mse_loss, adam(model))


# TheDeepChecker


def _log_of_softmax(z: Tensor, y: Tensor) -> Tensor:
    return -(kit.one_hot(y) * torch.log(torch.softmax(z, 1))).sum()


@case(
    CHECKER + "IPS_1",
    "the loss becomes nan after some hundred steps",
    "nan",
    answer="the logarithm of a softmax that is 0: use the fused loss. Inputs stay 0 to 255, so that it comes soon",
    born="loss|log",
)
def ips_1(fault: bool, watch: Watch) -> None:
    x, y = images()
    conv = nn.Sequential(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 64))
    model = kit.drawn(nn.Sequential(conv, nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10)), 0.1)
    if fault:
        fit(watch, model, (x * 255, y), _log_of_softmax, adam(model, 1e-4), batch=50)
    else:
        fit(watch, model, (x, y), F.cross_entropy, adam(model, 1e-3), batch=50)


@case(
    CHECKER + "IPS_4",
    "the loss begins at 100,000s, accuracy is low",
    "init_too_large",
    answer="weights from N(0, 1): scale them with the layer's width; 3×500 → 3×100 units",
)
def ips_4(fault: bool, watch: Watch) -> None:
    model = mlp(64, 100, 100, 100, 10)
    fit(watch, kit.drawn(model, 1, True) if fault else model, digits(), F.cross_entropy, adam(model, 0.003), batch=100)


@case(
    CHECKER + "IPS_5", "a line: the loss goes to inf, then nan", "lr_too_large", answer="lower the learning rate of 0.1"
)
def ips_5(fault: bool, watch: Watch) -> None:
    x = 16 * torch.rand(64, 1) - 8
    model = nn.Linear(1, 1)
    data = x, -5 * x + 3 + torch.rand(64, 1)
    fit(watch, model, data, F.mse_loss, sgd(model, 0.1 if fault else 0.01), steps=300, batch=8)


@case(
    CHECKER + "IPS_7",
    "the loss is nan from the beginning",
    "nan",
    answer="the logarithm of linear outputs, which may be negative: use the fused loss",
    born="loss|log",
)
def ips_7(fault: bool, watch: Watch) -> None:
    x, y = digits()

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return (-t * torch.log(z) - (1 - t) * torch.log(1 - z)).sum(1).mean()

    model = mlp(64, 64, 10, act=nn.Sigmoid)
    if fault:
        fit(watch, kit.drawn(model, 1), (x, kit.one_hot(y)), loss, sgd(model, 0.05), steps=200)
    else:
        fit(watch, model, (x, y), F.cross_entropy, sgd(model, 0.5))


@case(
    CHECKER + "IPS_11",
    "accuracy stops at a multiple of 10 %",
    "output_activation",
    "dead_units",
    answer="the last layer has a ReLU, so that the logits of some classes are 0 for ever",
)
def ips_11(fault: bool, watch: Watch) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10), *([nn.ReLU()] if fault else []),
    )  # fmt: skip
    fit(watch, kit.drawn(model, 0.1), images(), F.cross_entropy, adam(model), steps=600, batch=100)


@case(
    CHECKER + "IPS_13",
    "heart disease: the loss jumps, accuracy is that of one class",
    "inputs_not_scaled",
    "lr_too_large",
    "decay_too_large",
    answer="scale the columns, lower the learning rate of 0.5 and the weight penalty of 1",
)
def ips_13(fault: bool, watch: Watch) -> None:
    x, y = kit.cancer()
    x = x[:, :9]
    model = nn.Linear(9, 2)

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t) + (1 if fault else 1e-3) * 0.5 * model.weight.square().sum()

    fit(watch, model, (x * 10 if fault else scaled(x), y), loss, adam(model, 0.5 if fault else 0.01), batch=7)


@case(
    CHECKER + "IPS_14",
    "the loss is nan",
    "lr_too_large",
    "nan",
    answer="a loss summed over the batch, and its logarithm: mean, fused",
    born="loss|log",
)
def ips_14(fault: bool, watch: Watch) -> None:
    x, y = digits()
    model = kit.drawn(nn.Linear(64, 10), 1)
    if fault:
        fit(watch, model, (x * 16, y), _log_of_softmax, sgd(model, 0.01))
    else:
        fit(watch, model, (x, y), F.cross_entropy, sgd(model, 0.5))


@case(
    CHECKER + "IPS_15",
    "linear regression on 0…99: weights go to inf",
    "lr_too_large",
    "inputs_not_scaled",
    answer="learning rate 0.5 is far too large for inputs up to 99",
)
def ips_15(fault: bool, watch: Watch) -> None:
    t = torch.arange(100.0)[:, None]
    data = (
        torch.cat((t if fault else t / 100, torch.ones(100, 1)), 1),
        2 * t / (1 if fault else 100) + torch.rand(100, 1),
    )
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    fit(watch, model, data, F.mse_loss, sgd(model, 0.25), steps=300, batch=100)


@case(CHECKER + "IPS_17", "fitting a parabola gives nan", "lr_too_large", answer="learning rate 0.01 → 0.001")
def ips_17(fault: bool, watch: Watch) -> None:
    t = torch.tensor([[0.0], [1], [2], [3]])
    model = nn.Linear(2, 1)
    for p in model.parameters():
        nn.init.zeros_(p)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return (z - y).square().sum()

    fit(watch, model, (torch.cat((t**2, t), 1), t**2), loss, sgd(model, 0.01 if fault else 0.002), steps=400, batch=4)


@case(
    TENSORFLOW_EXAMPLES + "TFE_333)",
    "the cost is nan",
    "init_too_large",
    "lr_too_small",
    "nan",
    answer="weights from N(0, 1) and a logarithm of the softmax",
    born="loss|log",
)
def tfe_333(fault: bool, watch: Watch) -> None:
    x, y = digits()
    model = nn.Linear(64, 10)

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return -(kit.one_hot(t) * torch.log(torch.softmax(z, 1))).sum(1).mean()

    if fault:
        fit(watch, kit.drawn(model, 1, True), (x * 16, y), loss, sgd(model, 1e-3), batch=100)
    else:
        fit(watch, model, (x, y), F.cross_entropy, sgd(model, 0.1), batch=100)


@case(
    TENSORFLOW_EXAMPLES + "TFE_368)",
    "the loss begins in the thousands, accuracy is below that of a linear model",
    "init_too_large",
    "lr_too_large",
    "no_activation",
    answer="no activation between the layers, weights from N(0, 1), learning rate 0.1",
)
def tfe_368(fault: bool, watch: Watch) -> None:
    if fault:
        model = kit.drawn(mlp(64, 128, 128, 10, act=nn.Identity), 1, True)
        fit(watch, model, digits(), F.cross_entropy, adam(model, 0.1), batch=128)
    else:
        model = mlp(64, 128, 128, 10)
        fit(watch, model, digits(), F.cross_entropy, adam(model, 1e-3), batch=128)


@case(
    TENSORFLOW_EXAMPLES + "TFE_bc09f95)",
    "the loss is nan",
    "init_too_large",
    "lr_too_large",
    answer="weights from N(0, 1) and a loss that is summed over the batch: mean",
)
def tfe_bc09f95(fault: bool, watch: Watch) -> None:
    model = mlp(64, 128, 128, 10)

    def summed(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="sum")

    if fault:
        fit(watch, kit.drawn(model, 1, True), digits(), summed, sgd(model, 0.01), batch=100)
    else:
        fit(watch, model, digits(), F.cross_entropy, sgd(model, 0.1), batch=100)


# UMLAUT


@case(
    "UMLAUT (doi 10.1145/3411764.3445538), eval_a",
    "training loss is not going down on CIFAR-10",
    "no_log_softmax",
    "inputs_not_scaled",
    "dropout_too_large",
    answer="pixels 0 to 255, dropout 0.8, and a loss on probabilities gets logits; 64, 128 → 16, 32 channels",
)
def umlaut_a(fault: bool, watch: Watch) -> None:
    x, y = images(3)
    drop = 0.8 if fault else 0.2
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(drop), nn.Conv2d(16, 32, 2), nn.ReLU(),
        nn.Dropout(drop), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Dropout(drop), nn.Linear(64, 10),
    )  # fmt: skip
    loss = F.nll_loss if fault else F.cross_entropy
    fit(watch, model, (x * 255 if fault else x, y), loss, adam(model), batch=128, held_out=300)


# TrainCheck


def _conv_net() -> nn.Sequential:
    conv = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*conv, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


@case(
    "https://discuss.pytorch.org/t/obtaining-abnormal-changes-in-loss-and-accuracy/84911 (TrainCheck)",
    "accuracy stays at that of guessing",
    "frozen",
    answer="everything but batch normalisation is frozen, also the head, which is all the optimizer has",
)
def forum_84911(fault: bool, watch: Watch) -> None:
    model = _conv_net()
    optimizer = torch.optim.Adadelta(model[-1].parameters(), 1.0) if fault else adam(model)
    if fault:
        for i, p in model.named_parameters():
            p.requires_grad_(i.startswith(("1.", "4.")))
    fit(watch, model, images(), F.cross_entropy, optimizer, batch=64, held_out=300)


@case(
    SO + "60335387 (TrainCheck)",
    "the MNIST example does not converge",
    "zero_grad_missing",
    answer="optimizer.zero_grad() is missing",
)
def so_60335387(fault: bool, watch: Watch) -> None:
    model = _conv_net()
    optimizer = adam(model)
    watch(model)
    for x, y in kit.batches(*images(), size=64, steps=400):
        if not fault:
            optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


class _Dropping(nn.Module):
    """Dropout that does not ask for the mode of its module."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.one, self.two, self.always = nn.Linear(64, 64), nn.Linear(64, 10), always

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.dropout(F.relu(self.one(x)), 0.3, training=self.always or self.training))


@case(
    GITHUB + "huggingface/transformers/pull/33844 (TrainCheck)",
    "outputs differ from call to call in eval()",
    "evaluated_in_train_mode",
    answer="dropout is applied whatever self.training says; a dropout of an MLP for that of flash attention",
)
def transformers_33844(fault: bool, watch: Watch) -> None:
    model = _Dropping(fault)
    fit(watch, model, digits(), F.cross_entropy, adam(model), held_out=300)


@case(
    GITHUB + "open-mmlab/mmpretrain/issues/702 (TrainCheck)",
    "frozen stages are trained all the same",
    "freeze_not_applied",
    answer="stages are frozen in train(), which is not called before the optimizer is made and training begins",
)
def mmpretrain_702(fault: bool, watch: Watch) -> None:
    model = _conv_net()
    for p in model[0].parameters():
        p.requires_grad_(fault)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    fit(watch, model, images(), F.cross_entropy, optimizer, batch=64)


@case(
    GITHUB + "huggingface/accelerate/issues/2665 (TrainCheck)",
    "the loss is flat",
    "not_optimized",
    answer="the optimizer holds the parameters as they were before the model was wrapped; here a copy is made",
)
def accelerate_2665(fault: bool, watch: Watch) -> None:
    model = mlp(64, 64, 10)
    optimizer = adam(model)
    if fault:
        model = copy.deepcopy(model)
    fit(watch, model, digits(), F.cross_entropy, optimizer)
