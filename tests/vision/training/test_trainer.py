import json
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import IterableDataset
from transformers import Sam2Config, Sam2Model, Sam2Processor, Sam2VideoModel, Sam2VideoProcessor

from hf_iclr.vision.evaluation.j_and_f import region_similarity
from hf_iclr.vision.evaluation.procedural_clips import procedural_clip
from hf_iclr.vision.formats.annotated_videos import stream_videos
from hf_iclr.vision.training.clip_dataset import ClipDataset, collate_clips
from hf_iclr.vision.training.config import Sam2TrainingConfig
from hf_iclr.vision.training.modeling import Sam2ForTraining
from hf_iclr.vision.training.trainer import Sam2Trainer, layer_rates
from tests.trainers.distributed import run_in_two
from tests.vision.tiny import SIDE, tiny_model, tiny_processor


QUICK = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
QUICK |= {"num_frames": 3, "corrective_clicks": 1, "max_steps": 2, "per_device_train_batch_size": 2}
CLIPS = [procedural_clip(seed, frames=4, size=SIDE) for seed in range(4)]


def trainer(folder, model=None, clips=CLIPS, peft_config=None, **settings) -> Sam2Trainer:
    model = tiny_model() if model is None else model
    args = Sam2TrainingConfig(str(folder), **{**QUICK, **settings})
    return Sam2Trainer(model, args, clips, clips[:1], tiny_processor(), peft_config)


def still_model(**kwargs) -> Sam2VideoModel:
    """Without dropout, so that a step is determined by its batch."""
    return tiny_model(memory_attention_dropout=0.0, memory_attention_rope_dropout=0.0, **kwargs)


def test_training_changes_every_part_and_logs_the_terms_of_the_loss(tmp_path):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.named_parameters()}
    run = trainer(tmp_path, model, learning_rate=1e-3, vision_learning_rate=1e-3, max_steps=3)
    run.train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    parts = ["vision_encoder", "memory_attention", "memory_encoder", "mask_decoder", "prompt_encoder"]
    for part in [*parts, "object_pointer_proj", "memory_temporal_positional_encoding"]:
        assert any(name.startswith(part) for name in moved), part
    logs = run.state.log_history[0]
    weighted = {"focal", "dice", "iou_error", "object", "iou"}
    assert weighted <= set(logs)
    assert 0 <= logs["iou"] <= 1
    evaluated = run.evaluate()
    assert {"eval_loss", "eval_dice", "eval_iou", "eval_j", "eval_f", "eval_j_and_f"} <= set(evaluated)


def test_one_step_equals_the_loss_and_the_update_written_by_hand(tmp_path):
    """
    SGD with rate r moves each parameter by r times the gradient of 20 focal + dice + IoU distance + cross-entropy,
    summed over frames and divided by the number of objects. Here of two frames: the first shown by a box, the second
    tracked.
    """
    settings = {"mask_share": 0.0, "box_share": 1.0, "num_frames": 2, "max_corrected_frames": 0}
    settings |= {"max_prompted_frames": 1, "per_device_train_batch_size": 1, "max_steps": 1}
    model, rate = still_model(multimask_output_in_sam=False), 1e-2
    twin = still_model(multimask_output_in_sam=False).train()
    run = trainer(
        tmp_path, model, CLIPS[:1], optim="sgd", learning_rate=rate, vision_learning_rate=rate, layer_decay=1.0,
        weight_decay=0.0, max_grad_norm=1e9, lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    run.train()

    clip = run.train_dataset[0]
    pixels, masks, noise = clip["pixel_values"], clip["masks"], clip["noise"][:, 0, 0]
    objects = len(masks)
    features = twin.get_image_features(pixels, return_dict=True)
    sizes = twin.backbone_feature_sizes

    def maps(frame):
        levels = [level[:, [frame] * objects] for level in features.fpn_hidden_states]
        return levels, [x.permute(1, 2, 0).reshape(objects, -1, *s) for x, s in zip(levels, sizes, strict=True)]

    def decode(image, fine, points, labels):
        sparse, dense = twin.prompt_encoder(points, labels, None, None)
        places = twin.get_image_wide_positional_embeddings().repeat(objects, 1, 1, 1)
        return [output[:, 0] for output in twin.mask_decoder(image, places, sparse, dense, False, fine)]

    def loss_of(logits, score, seen, truth):
        logits = torch.where(seen[..., None, None] > 0, logits, -1024.0)
        logits = F.interpolate(logits, (SIDE, SIDE), mode="bilinear")[:, 0]
        y, p = truth.float(), logits.sigmoid()
        nats = -(y * F.logsigmoid(logits) + (1 - y) * F.logsigmoid(-logits))
        focal = (nats * torch.where(truth, 0.25 * (1 - p) ** 2, 0.75 * p**2)).mean((1, 2))
        dice = 1 - (2 * (p * y).sum((1, 2)) + 1) / (p.sum((1, 2)) + y.sum((1, 2)) + 1)
        found = logits > 0
        iou = (found & truth).sum((1, 2)) / (found | truth).sum((1, 2)).clamp(min=1)
        visible = truth.any(2).any(1).float()
        entropy = -(visible * F.logsigmoid(seen[:, 0]) + (1 - visible) * F.logsigmoid(-seen[:, 0]))
        return ((20 * focal + dice + (score[:, 0] - iou).abs()) * visible + entropy).sum()

    corners = []
    for truth, shift in zip(masks[:, 0], noise, strict=True):
        y, x = truth.nonzero(as_tuple=True)
        box = torch.stack([x.min(), y.min(), x.max(), y.max()]).float()
        reach = 0.1 * torch.stack([box[2] - box[0], box[3] - box[1]]).repeat(2)
        corners.append((box + (2 * shift - 1) * reach).clamp(0, SIDE - 1).view(1, 2, 2))
    levels, (*fine, image) = maps(0)
    labels = torch.tensor([2, 3], dtype=torch.int32).expand(objects, 1, 2)
    logits, score, token, seen = decode(
        image + twin.no_memory_embedding.view(1, -1, 1, 1), fine, torch.stack(corners), labels
    )
    total = loss_of(logits, score, seen, masks[:, 0])

    shown = torch.where(seen[..., None, None] > 0, logits, -1024.0)
    shown = F.interpolate(shown, (SIDE, SIDE), mode="bilinear")
    memory, places = twin._encode_new_memory(levels[-1], shown, seen[..., None], is_mask_from_pts=True)
    pointer = torch.where(seen > 0, twin.object_pointer_proj(token[:, 0]), twin.no_object_pointer)
    pointers = pointer.view(1, objects, 2, 64).permute(0, 2, 1, 3).flatten(0, 1)  # 128 = two tokens of 64
    levels, (*fine, image) = maps(1)
    attended = twin.memory_attention(
        levels[-1],
        torch.cat([memory.float(), pointers]),
        features.fpn_position_encoding[-1][:, [1] * objects],
        torch.cat([places + twin.memory_temporal_positional_encoding[-1], twin_pointer_places(twin, objects)]),
        num_object_pointer_tokens=2,
    )[0]
    image = attended.transpose(1, 2).reshape(objects, -1, *sizes[-1])
    nothing = torch.full((objects, 1, 1), -1, dtype=torch.int32)
    logits, score, _, seen = decode(image, fine, torch.zeros(objects, 1, 1, 2), nothing)
    loss = (total + loss_of(logits, score, seen, masks[:, 1])) / objects
    loss.backward()

    assert run.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    for (name, got), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6, msg=name)


def twin_pointer_places(model, objects):
    """Sine and cosine of one frame's distance, of at most two frames, as each of two tokens of 64."""
    rates = 10000 ** (2 * (torch.arange(64) // 2) / 64)
    waves = torch.cat([(1 / rates).sin(), (1 / rates).cos()])
    return model.temporal_positional_encoding_projection_layer(waves).expand(2, objects, 64)


def test_the_saved_folder_is_plain_transformers(tmp_path):
    run = trainer(tmp_path / "run", max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["Sam2VideoModel"]
    assert "hf_iclr" not in json.dumps(config)
    saved, info = Sam2VideoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert Sam2VideoProcessor.from_pretrained(tmp_path / "saved").target_size == SIDE
    for (name, value), other in zip(run.model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(value, other), name
    assert "forward" not in run.model.model.__dict__


def test_adapters_train_the_encoder_and_are_merged_when_saved(tmp_path):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = LoraConfig(r=2, init_lora_weights=False)
    run = trainer(
        tmp_path / "run", model, peft_config=config, learning_rate=1e-3, freeze=["prompt_encoder"], max_steps=1
    )
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad and n.startswith("vision_encoder"))
    run.train()
    run.save_model(str(tmp_path / "saved"))
    saved, info = Sam2VideoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    weights = saved.state_dict()
    moved = {name for name in before if not torch.equal(weights[name], before[name])}
    assert "vision_encoder.backbone.blocks.0.attn.qkv.weight" in moved
    assert "vision_encoder.backbone.blocks.0.attn.qkv.bias" not in moved
    assert any(name.startswith("memory_encoder") for name in moved)
    assert not any(name.startswith(("prompt_encoder", "vision_encoder.neck")) for name in moved)
    pixels = run.train_dataset[0]["pixel_values"]
    with torch.no_grad():
        expected = run.model.eval().get_image_features(pixels, return_dict=True).fpn_hidden_states[-1]
        got = saved.eval().get_image_features(pixels, return_dict=True).fpn_hidden_states[-1]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_layers_of_the_encoder_learn_ever_slower_towards_the_input():
    model, args = tiny_model(), Sam2TrainingConfig("unused", use_cpu=True, report_to="none")
    rates = {name: layer_rates(model, args)[parameter] for name, parameter in model.named_parameters()}
    assert rates["vision_encoder.backbone.blocks.4.attn.qkv.weight"] == pytest.approx(3e-6 * 0.9)
    assert rates["vision_encoder.backbone.blocks.0.attn.qkv.weight"] == pytest.approx(3e-6 * 0.9**5)
    assert rates["vision_encoder.backbone.patch_embed.projection.weight"] == pytest.approx(3e-6 * 0.9**6)
    assert rates["vision_encoder.backbone.pos_embed"] == rates["vision_encoder.neck.convs.0.weight"] == 3e-6
    assert rates["memory_encoder.projection.weight"] == rates["no_memory_embedding"] == 5e-6


def test_the_optimizer_uses_these_rates(tmp_path):
    run = trainer(tmp_path)
    rates = layer_rates(run.model.model, run.args)
    groups = run.create_optimizer().param_groups
    assert all(rates[parameter] == group["lr"] for group in groups for parameter in group["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(run.model.parameters()))


@pytest.mark.parametrize("adapters", [None, LoraConfig(r=2)])
def test_resumed_training_ends_where_unbroken_training_does(tmp_path, adapters):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 1e-3, "num_frames": 2}
    whole = trainer(tmp_path / "whole", peft_config=adapters, **settings)
    whole.train()
    again = trainer(tmp_path / "again", tiny_model(), peft_config=adapters, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for (name, value), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_checkpointing_frames_changes_nothing_but_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "bfloat16", torch.float32)  # the model rounds memories, which magnifies last bits
    losses, gradients = [], []
    for checkpointing in (False, True):
        run = trainer(tmp_path, still_model(), frame_checkpointing=checkpointing)
        batch = collate_clips([run.train_dataset[0], run.train_dataset[1]])
        loss = run.compute_loss(run.model.train(), batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in run.model.parameters() if p.grad is not None])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    plain, checkpointed = (torch.cat([gradient.flatten() for gradient in each]) for each in gradients)
    assert (plain - checkpointed).norm() < 1e-4 * plain.norm()


def test_images_and_videos_of_many_objects_train_in_one_batch_in_bf16(tmp_path):
    images = [procedural_clip(seed, hard=True, frames=1, size=SIDE) for seed in range(2)]
    run = trainer(tmp_path, clips=[CLIPS[0], *images, CLIPS[1]], bf16=True, per_device_train_batch_size=4)
    batch = collate_clips([run.train_dataset[index] for index in range(4)])["clips"]
    assert [len(clip["pixel_values"]) for clip in batch] == [3, 1, 1, 3]
    assert all(clip["plan"].kind != "mask" for clip in batch[1:3])
    # Torch's flash attention raises where ATEN_CPU_CAPABILITY hides from it what the processor has (AMX).
    with sdpa_kernel(SDPBackend.MATH):
        run.train()
    assert np.isfinite(run.state.log_history[-1]["train_loss"])
    assert run.model.no_memory_embedding.dtype == torch.float32


def test_the_image_model_trains(tmp_path):
    video = tiny_model()
    config = Sam2Config(
        vision_config=video.config.vision_config,
        prompt_encoder_config=video.config.prompt_encoder_config.to_dict(),
        mask_decoder_config=video.config.mask_decoder_config.to_dict(),
    )
    torch.manual_seed(0)
    model = Sam2Model(config)
    processor = Sam2Processor(tiny_processor().image_processor, target_size=SIDE)
    args = Sam2TrainingConfig(str(tmp_path), **{**QUICK, "learning_rate": 1e-3})
    before = {name: value.clone() for name, value in model.named_parameters()}
    run = Sam2Trainer(model, args, CLIPS, processing_class=processor)
    assert len(run.train_dataset[0]["pixel_values"]) == 1
    run.train()
    moved = {name.split(".")[0] for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {"vision_encoder", "mask_decoder", "prompt_encoder", "no_memory_embedding"} <= moved


def _train(folder, batch):
    torch.set_num_threads(1)
    run = trainer(
        folder, still_model(), optim="sgd", learning_rate=1e-2, per_device_train_batch_size=batch, max_steps=2
    )
    run.train()
    return {name: value.detach() for name, value in run.model.named_parameters()}, run.state.log_history[0]


def test_defaults_are_those_of_the_references_fine_tuning(tmp_path):
    """`sam2.1_hiera_b+_MOSE_finetune.yaml`: batches of 1, 40 epochs, 5e-6 down to a tenth of it; half way 2.75e-6."""
    args = Sam2TrainingConfig(str(tmp_path), use_cpu=True, report_to="none")
    assert args.per_device_train_batch_size == 1 and args.num_train_epochs == 40 and args.augment
    assert (args.weight_decay, args.max_grad_norm, args.num_frames, args.max_objects) == (0.1, 0.1, 8, 3)
    run = trainer(tmp_path, max_steps=4, num_frames=1, corrective_clicks=0, per_device_train_batch_size=1)
    run.train()
    rates = [log["learning_rate"] for log in run.state.log_history if "learning_rate" in log]
    assert rates[1] == pytest.approx(2.75e-6) and rates[3] == pytest.approx(5e-7)
    assert min(group["lr"] for group in run.optimizer.param_groups) == pytest.approx(3e-7 * 0.9**6)
    constant = Sam2TrainingConfig(str(tmp_path), lr_scheduler_type="constant", use_cpu=True, report_to="none")
    assert not constant.lr_scheduler_kwargs


def test_evaluation_has_j_and_f_of_each_set_and_metrics_of_ones_own(tmp_path):
    """
    What `compute_metrics` gets is what J is of: both are computed here once more, from clips of different lengths and
    numbers of objects, with frames whose mask was given left out.
    """
    seen = []

    def compute_metrics(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {"clips": len(prediction.predictions)}

    args = Sam2TrainingConfig(str(tmp_path), **QUICK, per_device_eval_batch_size=2)
    sets = {"near": [*CLIPS[:2], procedural_clip(9, frames=1, size=SIDE)], "far": CLIPS[3:]}
    run = Sam2Trainer(tiny_model(), args, CLIPS, sets, tiny_processor(), compute_metrics=compute_metrics)
    metrics = run.evaluate()
    assert metrics["eval_near_loss"] > 0 and metrics["eval_near_clips"] == 3 and metrics["eval_far_clips"] == 1
    for (predicted, true), name in zip(seen, sets, strict=True):
        assert predicted.shape == true.shape == (len(sets[name]), 3, 3, SIDE, SIDE)
        assert set(np.unique(true)) == {-100, 0, 1} and np.array_equal(predicted == -100, true == -100)
        scores = []
        for clip in range(len(true)):
            for obj in range(3):
                frames = [t for t in range(3) if true[clip, t, obj, 0, 0] >= 0]
                if frames:
                    one, other = (masks[clip, frames, obj] > 0 for masks in (predicted, true))
                    scores.append(region_similarity(one, other).mean())
        assert metrics[f"eval_{name}_j"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert run.evaluate(CLIPS[:1])["eval_j_and_f"] >= 0
    assert "test_loss" in run.predict(CLIPS[:1]).metrics


def test_the_best_checkpoint_by_j_and_f_is_loaded_at_the_end(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    settings |= {"metric_for_best_model": "j_and_f", "greater_is_better": False, "load_best_model_at_end": True}
    run = trainer(tmp_path, learning_rate=1e-2, vision_learning_rate=1e-2, lr_scheduler_type="constant", **settings)
    run.train()
    best = Sam2VideoModel.from_pretrained(run.state.best_model_checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), run.model.model.parameters(), strict=True))


class Stream(IterableDataset):
    """Videos that come one after another, one of them broken."""

    def __iter__(self):
        yield from (CLIPS[0], (CLIPS[1].frames, {1: CLIPS[1].masks[1] & False}), CLIPS[2])


def rows_of(clip, name):
    for obj, masks in clip.masks.items():
        yield {"video": clip.frames, "name": name, "object": obj, "frames": list(range(4)), "masks": list(masks)}


@pytest.mark.parametrize(
    "videos",
    [
        Stream(),
        [{"frames": clip.frames, "masks": clip.masks} for clip in CLIPS[:2]],
        [*rows_of(CLIPS[0], "a"), *rows_of(CLIPS[1], "b")],
    ],
    ids=["stream", "dicts", "rows"],
)
def test_streams_and_lists_of_dictionaries_train(tmp_path, videos):
    run = trainer(tmp_path, clips=CLIPS)
    run = Sam2Trainer(tiny_model(), run.args, videos, processing_class=tiny_processor())
    run.train()
    assert run.state.global_step == 2 and np.isfinite(run.state.log_history[0]["loss"])
    if not isinstance(videos, list):
        assert len(list(run.train_dataset)) == 2
    else:
        assert len(run.train_dataset[0]["masks"]) == 2


def test_rows_of_a_stream_are_joined_by_their_video():
    streamed = stream_videos([*rows_of(CLIPS[0], "a"), CLIPS[2], *rows_of(CLIPS[1], "b")])
    assert [(video.name, sorted(video.masks(0))) for video in streamed] == [
        ("a", [1, 2]), ("clip 2", [1, 2]), ("b", [1, 2]),
    ]  # fmt: skip


def _shard(batch):
    """Two processes, each with half of every weight, and the loss and one gradient that they make together."""
    torch.set_num_threads(1)
    whole = Sam2ForTraining(still_model(), Sam2TrainingConfig("unused", use_cpu=True, report_to="none")).train()
    sharded = deepcopy(whole)
    for block in sharded.model.vision_encoder.backbone.blocks:
        fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    results = []
    for module in (whole, sharded):
        loss = module(batch)["loss"]
        loss.backward()
        gradient = module.model.no_memory_embedding.grad
        results.append((loss.item(), getattr(gradient, "full_tensor", lambda gradient=gradient: gradient)()))
    return results


def test_fsdp_shards_the_module(tmp_path):
    batch = [ClipDataset(CLIPS[:1], tiny_processor(), 2, prompts={"clicks": 1})[0]]
    for (loss, gradient), (sharded_loss, sharded_gradient) in run_in_two(_shard, tmp_path, batch):
        assert sharded_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(sharded_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_two_processes_equal_one(tmp_path):
    (first, logs), (second, _) = run_in_two(_train, tmp_path, tmp_path / "two", 1)
    alone, alone_logs = _train(tmp_path / "one", 2)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert logs["iou"] == pytest.approx(alone_logs["iou"], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_frames": 0}, "num_frames of at least 1"),
        ({"mask_share": 0.8, "box_share": 0.3}, "at most 1 together"),
        ({"layer_decay": 0.0}, "layer_decay above 0"),
        ({"freeze": ["encoder"]}, "parts to freeze among vision_encoder"),
        ({"activation_checkpointing": True}, "frame_checkpointing=True"),
    ],
)
def test_bad_settings_get_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sam2TrainingConfig("unused", use_cpu=True, report_to="none", **settings)


def test_other_models_and_missing_processors_get_a_sentence(tmp_path):
    args = Sam2TrainingConfig(str(tmp_path), **QUICK)
    with pytest.raises(TypeError, match="Sam2VideoModel or a Sam2Model, got Linear"):
        Sam2Trainer(torch.nn.Linear(1, 1), args)
    with pytest.raises(ValueError, match="processing_class=AutoProcessor"):
        Sam2Trainer(tiny_model(), args)
    with pytest.raises(ValueError, match="at least one video"):
        ClipDataset([], tiny_processor())
    with pytest.raises(TypeError, match=r"got dict of \['train'\].*dataset\['train'\]"):
        Sam2Trainer(tiny_model(), args, {"train": CLIPS}, processing_class=tiny_processor())
    for videos in ("DAVIS", (clip for clip in CLIPS)):
        with pytest.raises(TypeError, match=r"Pass read_videos\(folder\), list\(videos\), or an IterableDataset"):
            Sam2Trainer(tiny_model(), args, videos, processing_class=tiny_processor())
