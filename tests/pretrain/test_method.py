import pytest
import torch

from pathfm.models.vit import MaskedViT, build_backbone
from pathfm.pretrain import losses
from pathfm.pretrain.encoder import build_objective
from pathfm.pretrain.method import SelfDistillation
from pathfm.pretrain.optim import build_optimizer, clip_gradients, decays, lr_factor, set_values, submodules
from pathfm.pretrain.schedule import Schedules, StepValues
from pathfm.pretrain.training import prepare
from tests.pretrain.conftest import batches, tiny


@pytest.fixture(scope="module")
def inputs(stores):
    return prepare(batches(stores, tiny())[0], values())


def method(**changes) -> SelfDistillation:
    torch.manual_seed(0)
    objective = build_objective(tiny(**changes), torch.device("cpu"))[0]
    assert isinstance(objective, SelfDistillation)
    return objective


def values(temperature: float = 0.05, **changes) -> StepValues:
    return Schedules(tiny())(0)._replace(teacher_temperature=temperature, **changes)


def test_the_terms_are_the_losses_of_the_pieces(inputs):
    model = method(layer_scale=0.0, centering="softmax")
    with torch.no_grad():
        for parameter in model.student.backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # so that student and teacher differ
    center_dino, center_ibot = torch.randn(32) * 0.1, torch.randn(32) * 0.1
    model.center_dino.mean_K.copy_(center_dino)
    model.center_ibot.mean_K.copy_(center_ibot)
    terms = model(inputs, values())
    seen, masks = inputs.global_images, inputs.masks_CP
    with torch.no_grad():
        teacher, student = model.teacher, model.student
        whole, hidden = teacher.backbone.tokens(seen), student.backbone.tokens(seen, masks)
        target = torch.softmax((teacher.dino_head(whole.cls_ND) - center_dino) / 0.05, dim=1)
        student_logits = student.dino_head(torch.cat([hidden.cls_ND, student.backbone.tokens(inputs.local_images).cls_ND]))
        log_student = torch.log_softmax(student_logits / 0.1, dim=1)

        def cross_entropy(view: int, teacher_view: int):
            return -(target[4 * teacher_view :][:4] * log_student[4 * view :][:4]).sum(1).mean()

        expected_global = (cross_entropy(0, 1) + cross_entropy(1, 0)) / 6
        expected_local = sum(cross_entropy(view, teacher_view) for view in (2, 3) for teacher_view in (0, 1)) / 6
        patches = torch.softmax((teacher.dino_head(whole.patches_NPD[masks]) - center_ibot) / 0.05, dim=1)
        log_patches = torch.log_softmax(student.dino_head(hidden.patches_NPD[masks]) / 0.1, dim=1)
        expected_ibot = -((patches * log_patches).sum(1) * inputs.weight_M).sum() / 8
        expected_koleo = losses.koleo_loss(hidden.cls_ND[:4]) + losses.koleo_loss(hidden.cls_ND[4:])
    torch.testing.assert_close(terms["dino_global"], expected_global)
    torch.testing.assert_close(terms["dino_local"], expected_local)
    torch.testing.assert_close(terms["ibot"], expected_ibot)
    torch.testing.assert_close(terms["koleo"], expected_koleo)
    torch.testing.assert_close(terms["loss"], expected_global + expected_local + expected_ibot + 0.1 * expected_koleo)
    torch.testing.assert_close(model.center_dino.mean_K, center_dino)  # it moves when the step is over
    model.end_step(1.0)
    logits_NK = teacher.dino_head(whole.cls_ND).detach()
    torch.testing.assert_close(model.center_dino.mean_K, 0.9 * center_dino + 0.1 * logits_NK.mean(dim=0), rtol=1e-4, atol=1e-6)
    assert not torch.equal(model.center_ibot.mean_K, center_ibot)


def test_the_teacher_gets_no_gradient_and_the_student_gets_all(inputs):
    model = method()
    model(inputs, values())["loss"].backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert [name for name, parameter in model.student.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("changes", [{"centering": "sinkhorn"}, {"separate_ibot_head": True}, {"mask_probability": 0.0}])
def test_variants_give_finite_losses(stores, inputs, changes):
    if "mask_probability" in changes:
        inputs = inputs._replace(
            masks_CP=torch.zeros_like(inputs.masks_CP), masked_M=inputs.masked_M[:0], weight_M=inputs.weight_M[:0]
        )
    model = method(**changes)
    terms = model(inputs, values())
    terms["loss"].backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert (float(terms["ibot"].detach()) == 0) == ("mask_probability" in changes)


def test_the_teacher_follows_every_parameter_of_the_student():
    model = method()
    before = [parameter.clone() for parameter in model.teacher.parameters()]
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(1.0)
    model.end_step(0.9)
    for old, new in zip(before, model.teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1)


def test_only_the_student_drops_paths():
    model = method(drop_path=0.5).train()
    assert not model.teacher.training and model.student.training
    image = torch.randn(2, 3, 32, 32)
    once, twice = (model.teacher.backbone.tokens(image).cls_ND for _ in range(2))
    assert torch.equal(once, twice)
    rates = {block.drop_path1.drop_prob for block in model.student.backbone.vit.blocks}
    assert rates == {0.5}


def test_centres_stand_still_outside_training(inputs):
    model = method().eval()
    model(inputs, values())
    assert not model.center_dino.mean_K.any() and not model.center_ibot.mean_K.any()


def test_layers_further_down_learn_more_slowly():
    def factor(name):
        return lr_factor(name, depth=12, layer_decay=0.9, patch_embed_lr=0.2)

    assert factor("backbone.vit.norm.weight") == 1
    assert factor("backbone.vit.blocks.11.mlp.fc1.weight") == pytest.approx(0.9)
    assert factor("backbone.vit.blocks.0.norm1.bias") == pytest.approx(0.9**12)
    for name in ("vit.pos_embed", "vit.cls_token", "vit.reg_token", "mask_token"):
        assert factor(f"backbone.{name}") == pytest.approx(0.9**13)
    assert factor("backbone.vit.patch_embed.proj.weight") == pytest.approx(0.2 * 0.9**13)


def test_what_decays():
    kept = ["vit.blocks.0.norm1.weight", "vit.blocks.0.attn.qkv.bias", "vit.blocks.0.ls1.gamma", "vit.norm.weight"]
    assert not any(decays(name) for name in kept)
    assert all(decays(name) for name in ["vit.pos_embed", "vit.cls_token", "mask_token", "last_layer.weight_g", "mlp.0.weight"])


def test_every_parameter_is_in_one_group_and_the_last_layer_is_frozen_first():
    model = method(steps=20, warmup_steps=2, freeze_last_layer_steps=5, registers=2)
    optimizer = build_optimizer(model.student, 12, model.settings)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.student.parameters())
    schedules = Schedules(model.settings)
    for step, frozen in ((4, True), (5, False)):
        set_values(optimizer, schedules(step))
        last = [group for group in optimizer.param_groups if group["last_layer"]]
        rest = [group for group in optimizer.param_groups if not group["last_layer"]]
        assert last and all((group["lr"] == 0) == frozen for group in last)
        assert all(group["lr"] == schedules(step).lr * group["lr_factor"] > 0 for group in rest)
        assert {group["weight_decay"] for group in rest} == {0.0, schedules(step).weight_decay}


def test_gradients_are_clipped_per_sub_module():
    model = method(separate_ibot_head=True)
    for parameter in model.student.parameters():
        parameter.grad = torch.ones_like(parameter)
    for parameter in model.student.dino_head.parameters():
        parameter.grad *= 1e-6
    norms = clip_gradients(model.student, 3.0)
    assert submodules(model.student) == ["backbone", "dino_head", "ibot_head"]
    after = [torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]) for module in model.student.children()]
    assert [float(norm) for norm in after] == pytest.approx([3.0, float(norms[1]), 3.0], rel=1e-3)
    assert norms[0] > 3 > norms[1]


def test_the_student_does_not_see_what_is_masked():
    backbone = MaskedViT(build_backbone(tiny(), 32))
    image, mask = torch.randn(1, 3, 32, 32), torch.tensor([[True, False, False, False]])
    changed = image.clone()
    changed[:, :, :16, :16] += 1
    torch.testing.assert_close(backbone.tokens(image, mask).cls_ND, backbone.tokens(changed, mask).cls_ND)
    assert not torch.allclose(backbone.tokens(image).cls_ND, backbone.tokens(changed).cls_ND)
