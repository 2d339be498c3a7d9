"""The baselines: each loss and gradient against float64 written pair by pair from its paper, and each as a whole run."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import relssl
from relssl.data.images import Images, Pixels
from relssl.data.named import load
from relssl.engine import Engine
from relssl.errors import ConfigError, DataError
from relssl.evaluation.pairs import choose
from relssl.method import BYOL, SCE, Classifier, Encoder, Method, MoCo, SimCLR, SimSiam, Step, Supervised
from relssl.settings.run import resolve
from relssl.train.loop import forward, scheduled
from relssl.train.run import build, complete_settings, create_run
from small_runs import NORMLESS, SMALL, differing, final_state, merge, repeatable_rows, small_run
from test_ranks import finish, start

KEYS = {"memory_size": 24, "dim": 12}
Net = Callable[..., nn.Module]


def encoder(tiny_net: Net, predictor: str = "none") -> Encoder:
    """Without batch norm, so that views can be taken one by one."""
    made = Encoder(tiny_net(norm=False), 16, projector_hidden=32, dim=12, predictor=predictor, predictor_norm="none")
    for parameter in made.parameters():  # apart from the teacher, as after some training, and far from symmetric
        nn.init.normal_(parameter, std=0.3)
    return made


def moved(model: Method) -> Method:
    """The model with a teacher that is another network than its student."""
    if model.teacher is not None:
        for parameter in model.teacher.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def views(batch: int = 6) -> tuple[Tensor, Tensor]:
    return torch.rand(batch, 3, 8, 8), torch.rand(batch, 3, 8, 8)


def equal(model: Method, made: Step, exact: Method, loss: Tensor) -> None:
    """A step's loss and its student's gradients are those of a float64 loss of the model's copy; nothing else has any."""
    made.loss.backward()
    loss.backward()
    assert made.loss.dtype == torch.float32
    assert float(made.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    ours, theirs = (torch.cat([p.grad.flatten().double() for p in m.student.parameters()]) for m in (model, exact))
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert all(p.grad is None for m in (model, exact) if m.teacher is not None for p in m.teacher.parameters())
    assert not made.queries.requires_grad and not made.keys.requires_grad


def choices(query: Tensor, key: Tensor, memory: Tensor, temperature: float) -> Tensor:
    """[1 + K] similarities of one query to its own key and the memory, over the temperature."""
    return torch.stack([query @ key, *(query @ other for other in memory)]) / temperature


def moco_loss(queries: Tensor, keys: Tensor, memory: Tensor) -> Tensor:
    rows = [choices(q, k, memory, 0.2)[None] for q, k in zip(queries, keys, strict=True)]
    return torch.stack([F.cross_entropy(row, torch.tensor([0])) for row in rows]).mean()


def sce_loss(queries: Tensor, keys: Tensor, memory: Tensor) -> Tensor:
    """Denize et al., eq. 4 to 7, with lambda 0.3: the relation leaves the positive out, the student's softmax has it."""
    losses = []
    for q, k in zip(queries, keys, strict=True):
        similar = torch.stack([(k @ other / 0.05).exp() for other in memory])
        among = choices(q, k, memory, 0.1).exp()
        target = torch.cat([torch.tensor([0.3], dtype=torch.float64), 0.7 * similar / similar.sum()])
        losses.append(-sum(w * (p / among.sum()).log() for w, p in zip(target, among, strict=True)))
    return torch.stack(losses).mean()


WITH_MEMORY: dict[str, tuple[type[Method], dict[str, float], Callable[..., Tensor]]] = {
    "moco": (MoCo, {"info_nce_temperature": 0.2}, moco_loss),
    "sce": (SCE, {"student_temperature": 0.1, "teacher_temperature": 0.05, "positive_share": 0.3}, sce_loss),
}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", WITH_MEMORY)
def test_moco_and_sce_in_one_and_in_both_directions(tiny_net: Net, name: str, symmetric: bool) -> None:
    kind, settings, oracle = WITH_MEMORY[name]
    model: Any = moved(kind(encoder(tiny_net), **KEYS, symmetric=symmetric))
    exact = copy.deepcopy(model).double()
    weak, strong = views()
    made = model.step(weak, [strong], **settings)
    embed, teach, memory = exact.student.embed, exact.teacher.embed, exact.memory.keys
    keys = teach(weak.double()).detach()
    loss = oracle(embed(strong.double()), keys, memory)
    if symmetric:
        loss = (loss + oracle(embed(weak.double()), teach(strong.double()).detach(), memory)) / 2
    torch.testing.assert_close(made.keys, keys.float())  # of the first view, which the memory is given
    assert made.queries.shape == (1, 6, 12)  # matched to those keys
    equal(model, made, exact, loss)


def test_one_direction_takes_several_crops(tiny_net: Net) -> None:
    model = SCE(encoder(tiny_net), **KEYS)
    weak, strong = views()
    other = torch.rand(6, 3, 6, 6)
    settings = {"student_temperature": 0.1, "teacher_temperature": 0.05}
    both = model.step(weak, [strong, other], **settings).loss
    each = [model.step(weak, [view], **settings).loss for view in (strong, other)]
    torch.testing.assert_close(both, torch.stack(each).mean())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_sce_between_its_ends(tiny_net: Net, share: float) -> None:
    """A share of 1 is InfoNCE; one of 0 asks nothing of the positive but that it takes no part of the softmax."""
    model: Any = moved(SCE(encoder(tiny_net), **KEYS))
    weak, strong = views()
    found = model.step(weak, [strong], student_temperature=0.1, teacher_temperature=0.05, positive_share=share).loss
    q, k, memory = model.student.embed(strong), model.teacher.embed(weak), model.memory.keys
    scores = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ memory.T], dim=1) / 0.1
    target = torch.cat([torch.zeros(6, 1), (k @ memory.T / 0.05).softmax(dim=1)], dim=1)
    wanted = F.cross_entropy(scores, target if share == 0 else torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(found, wanted)


def test_nt_xent_of_simclr(tiny_net: Net) -> None:
    model: Any = SimCLR(encoder(tiny_net))
    exact = copy.deepcopy(model).double()
    weak, strong = views()
    made = model.step(weak, [strong], info_nce_temperature=0.5)
    z = [row for view in (weak, strong) for row in exact.student.embed(view.double())]
    losses = []
    for i in range(12):
        j = (i + 6) % 12
        others = sum((z[i] @ z[k] / 0.5).exp() for k in range(12) if k != i)
        losses.append(-((z[i] @ z[j] / 0.5).exp() / others).log())
    equal(model, made, exact, torch.stack(losses).mean())


def test_byol_and_its_teacher(tiny_net: Net) -> None:
    model: Any = moved(BYOL(encoder(tiny_net, "mlp")))
    exact = copy.deepcopy(model).double()
    weak, strong = views()
    made = model.step(weak, [strong])
    assert model.teacher.predictor is None
    loss = torch.zeros((), dtype=torch.float64)
    for seen, other in ((weak, strong), (strong, weak)):  # eq. 2, the squared distance, and its other direction
        prediction, target = exact.student.embed(seen.double()), exact.teacher.embed(other.double())
        loss = loss + sum(((p - t) ** 2).sum() for p, t in zip(prediction, target, strict=True)) / 6
    torch.testing.assert_close(made.keys, exact.teacher.embed(weak.double()).float())
    equal(model, made, exact, loss)


def simsiam_loss(student: Encoder, weak: Tensor, strong: Tensor, stop: bool) -> Tensor:
    """Chen & He, Algorithm 1, from the networks' raw outputs."""
    z = [student.projector(student.backbone(view.double())) for view in (weak, strong)]
    assert student.predictor is not None
    p = [student.predictor(each) for each in z]
    aims = [each.detach() if stop else each for each in z]
    return sum(-F.cosine_similarity(p[i], aims[1 - i], dim=1).mean() / 2 for i in (0, 1))  # type: ignore[return-value]


def test_simsiam_and_its_stop_gradient(tiny_net: Net) -> None:
    model: Any = SimSiam(encoder(tiny_net, "mlp"))
    exact, without = (copy.deepcopy(model).double() for _ in range(2))
    weak, strong = views()
    made = model.step(weak, [strong])
    equal(model, made, exact, simsiam_loss(exact.student, weak, strong, stop=True))
    simsiam_loss(without.student, weak, strong, stop=False).backward()
    stopped, through = (m.student.backbone.conv.weight.grad for m in (exact, without))
    assert (stopped - through).norm() > 1e-3 * stopped.norm()  # else this test would see nothing


def test_cross_entropy_of_supervised_learning(tiny_net: Net) -> None:
    model: Any = Supervised(Classifier(tiny_net(norm=False), 16, classes=5))
    exact = copy.deepcopy(model).double()
    weak, labels = views()[0], torch.tensor([0, 4, 2, 2, 1, 3])
    made = model.step(weak, [], labels=labels)
    (layer,) = exact.student.projector
    logits = exact.student.backbone(weak.double()) @ layer.weight.T + layer.bias
    loss = -sum(row[label] - row.exp().sum().log() for row, label in zip(logits, labels, strict=True)) / 6
    equal(model, made, exact, loss)
    torch.testing.assert_close(made.keys.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(made.keys, F.normalize(logits, dim=1).float())


def test_losses_are_fp32_whatever_autocast_says(tiny_net: Net) -> None:
    """Of embeddings that bf16 networks made, the loss is that of float64 to more digits than bf16 has."""
    weak, strong = views()
    sce = SCE(encoder(tiny_net), **KEYS)
    simclr = SimCLR(encoder(tiny_net))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        soft = sce.step(weak, [strong], student_temperature=0.1, teacher_temperature=0.05, positive_share=0.3)
        hard = simclr.step(weak, [strong], info_nce_temperature=0.1)
    exact = sce_loss(soft.queries[0].double(), soft.keys.double(), sce.memory.keys.double())  # type: ignore[union-attr]
    assert float(soft.loss.detach()) == pytest.approx(float(exact), rel=1e-6)
    z = hard.queries.double().flatten(end_dim=1)
    wanted = F.cross_entropy((z @ z.T / 0.1).fill_diagonal_(-torch.inf), torch.arange(12).roll(6))
    assert float(hard.loss.detach()) == pytest.approx(float(wanted), rel=1e-6)
    for model in (BYOL(encoder(tiny_net, "mlp")), SimSiam(encoder(tiny_net, "mlp"))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model.step(weak, [strong]).loss.dtype == torch.float32


def over(name: str) -> dict[str, Any]:
    """A run of a few steps."""
    predictor = {"encoder.predictor": "mlp", "encoder.predictor_hidden": 16} if name in ("byol", "simsiam") else {}
    short = {"max_images": 96, "log": {"knn_images": [40, 40]}, "method.name": name}
    if name == "options":
        short |= {"method.name": "ressl", "method.relation": "features", "method.sinkhorn_iterations": 2}
    return short | predictor | {"method.symmetric": name in ("moco", "sce"), "recipe": "digits"}


@pytest.mark.parametrize("name", ["moco", "sce", "simclr", "byol", "simsiam", "supervised", "options"])
def test_a_run_trains_resumes_exactly_and_hands_over(tmp_path: Path, name: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = small_run(whole, **over(name))
    networks = ["student", "teacher"] if name in ("moco", "sce", "byol", "options") else ["student"]
    assert [row["step"] for row in result.rows] == [0, 3, 6] and "knn_top1" in result.rows[-1]
    assert ("knn_teacher_top1" in result.rows[-1]) == ("teacher" in networks)
    assert ("teacher_neighbours" in result.rows[-1]) == (name in ("moco", "sce", "options"))
    assert 0 < result.rows[-1]["effective_rank"] <= 16 and result.rows[-1]["grad_norm"] > 0
    exported = sorted(path.stem for path in (whole / "export").glob("*.safetensors"))
    assert exported == ["backbone", "backbone-teacher"][: len(networks)]

    shutil.copytree(whole, cut)
    relssl.resume(cut, checkpoint="step-00000003", quiet=True)
    assert differing(final_state(whole), final_state(cut)) == []
    assert repeatable_rows(whole) == repeatable_rows(cut)

    protocol = {"protocol": "knn", "knn": {"k": [5], "temperature": [0.1]}, "images": [40, 40], "resamples": 100, "cache": False}
    found = relssl.evaluate(whole, "digits", **protocol)
    assert [one["network"] for one in found["results"]] == networks
    images = torch.rand(2, 3, 32, 32)
    exported_features = relssl.load_backbone(whole / "export/backbone.safetensors")(images)
    torch.testing.assert_close(exported_features, relssl.load_backbone(whole)(images))
    if networks == ["student"]:
        for work in (
            lambda: relssl.evaluate(whole, "digits", **protocol, network="student,teacher"),
            lambda: relssl.export(whole, network="teacher"),
            lambda: relssl.embed(whole, "digits", tmp_path / "features.npz", network="teacher"),
        ):
            with pytest.raises(ConfigError, match="not teacher"):
                work()
    card = (whole / "export/backbone.md").read_text()
    assert ("trained on labels" in card) == (name == "supervised") and ("ReSSL" in card) == (name == "options")


@pytest.mark.torture
def test_two_ranks_of_simclr_are_each_others_negatives(tmp_path: Path) -> None:
    own = {"recipe": "digits", "epochs": 1, "max_images": 96, "log": {"knn_every": 0}, "method": {"name": "simclr"}}
    own["optimizer"] = {"warmup_epochs": 0}
    settings = merge(merge(SMALL, NORMLESS), own) | {"backbone_args": NORMLESS["backbone_args"]}
    two = start(tmp_path / "two", settings)
    small_run(tmp_path / "one", **merge(NORMLESS, own))
    told = finish(two)
    assert two.returncode == 0, told
    one, both = final_state(tmp_path / "one"), final_state(tmp_path / "two")
    for name in one:
        if name.startswith("student."):
            torch.testing.assert_close(one[name], both[name], rtol=1e-4, atol=1e-5)
    alone, shared = (repeatable_rows(tmp_path / name) for name in ("one", "two"))
    assert [row["loss"] for row in alone] == pytest.approx([row["loss"] for row in shared], rel=1e-5)


def test_supervised_learning_wants_labels(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(8):
        Image.new("RGB", (32, 32), (number * 30, 0, 0)).save(tmp_path / f"{number}.png")
    config = resolve(merge(SMALL, {"data": str(tmp_path), "recipe": "digits", "batch_size": 4, "method": {"name": "supervised"}}))
    with pytest.raises(DataError, match="supervised needs a label for each image") as refused:
        build(config, Engine(config.engine))
    assert refused.value.exit_code == 3 and "\n" not in str(refused.value)
    pixels, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, -1, 1]).numpy()
    assert Images("some", Pixels(pixels), labels=labels).class_count == 0  # of which one has none
    assert Images("some", Pixels(pixels), labels=labels + 1).class_count == 3


def test_a_few_of_the_labelled_images_keep_all_classes_and_their_own_labels() -> None:
    config = resolve(merge(SMALL, {"batch_size": 4, "max_images": 8, "method": {"name": "supervised"}}))
    images = choose(load("digits", None, "train"), 8, 0)
    assert images.labels is not None and len(set(images.labels.tolist())) < 10
    run = create_run(complete_settings(config, images), Engine(config.engine), images)
    student = run.state.model.student
    assert student.projector[0].out_features == 10  # type: ignore[union-attr, index]
    ((part,),) = run.loader.stream(0, 1)
    assert part.strong == [] and run.labels is not None
    step = forward(run, part, scheduled(run, 0))
    logits = student([part.weak])[0]
    wanted = F.cross_entropy(logits, torch.from_numpy(images.labels[part.ids.numpy()]))
    torch.testing.assert_close(step.loss, wanted, rtol=1e-4, atol=1e-5)
