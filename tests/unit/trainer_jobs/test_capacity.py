"""What a job needs of memory, and when it is refused for it."""

import pytest

from kiln_common.pb import common_pb2, engine_pb2, trainer_pb2
from kiln_trainer.domain.capacity import Capacity, largest_batch, memory_needs
from kiln_trainer.jobs.capacity_check import JobExceedsMemory, check_capacity, largest_micro_batch
from kiln_trainer.torch_backend.available_memory import host_bytes
from tests.support.jobs import grpo_request, opd_request, sft_request
from tests.support.registry import base_model

ENGINE = engine_pb2.EngineInfo(base_model=base_model())  # layers of 8 x 24, 8 x 12 and 12 x 8
ALL_FEATURES = 32 + 20 + 20


def capacity(available_bytes, **fields):
    return Capacity(available_bytes, base_shared_bytes=999, base_copied_bytes=0, token_bytes=10.0, **fields)


def test_an_adapters_parameters_its_optimizer_and_its_tokens_add_up():
    needs = memory_needs(capacity(0, fixed_bytes=7, copy_bytes=2), 3, [(8, 24), (8, 12)], num_tokens=5)
    num_parameters = 3 * (32 + 20)
    assert needs.adapter_bytes == num_parameters * (4 + 2)
    assert needs.optimizer_bytes == num_parameters * 12
    assert needs.activation_bytes == 5 * 10 + 7
    assert needs.total_bytes == needs.adapter_bytes + needs.optimizer_bytes + needs.activation_bytes


def test_the_largest_batch_is_the_one_that_just_fits():
    needs = memory_needs(capacity(0), 2, [(8, 24)], num_tokens=1)
    room = capacity(needs.adapter_bytes + needs.optimizer_bytes + 105)
    assert largest_batch(room, needs) == 10
    assert largest_batch(capacity(5), needs) == 0


def test_a_job_is_refused_by_a_byte_and_told_every_part():
    request = sft_request(batch_tokens=64)  # three tokens, rank 2
    needed = 2 * ALL_FEATURES * 16 + 3 * 10
    check_capacity(request, ENGINE, capacity(needed))
    with pytest.raises(JobExceedsMemory) as caught:
        check_capacity(request, ENGINE, capacity(needed - 1))
    details = caught.value.details
    assert details == {
        "base_shared_bytes": 999,
        "base_copied_bytes": 0,
        "adapter_bytes": 2 * ALL_FEATURES * 4,
        "optimizer_bytes": 2 * ALL_FEATURES * 12,
        "activation_bytes": 30,
        "total_bytes": needed,
        "available_bytes": needed - 1,
        "micro_batch_tokens": 3,
        "largest_batch_tokens": 2,
    }
    assert str(needed) in str(caught.value)


def test_only_the_targeted_layers_count():
    for targets, features in ((["mlp"], 40), (["attention"], 32), (["down_proj"], 20), ([], ALL_FEATURES)):
        lora = trainer_pb2.LoraConfig(rank=2, targets=targets)
        request = sft_request(lora=lora)
        check_capacity(request, ENGINE, capacity(2 * features * 16 + 30))
        with pytest.raises(JobExceedsMemory):
            check_capacity(request, ENGINE, capacity(2 * features * 16 + 29))


def test_the_layer_that_drafts_counts_where_it_learns():
    engine = engine_pb2.EngineInfo(base_model=base_model())
    engine.base_model.draft_modules.add(path="mtp.fc", in_features=16, out_features=8)
    for trains_mtp, features in ((False, ALL_FEATURES), (True, ALL_FEATURES + 24)):
        request = sft_request(train_mtp=trains_mtp)
        check_capacity(request, engine, capacity(2 * features * 16 + 30))
        with pytest.raises(JobExceedsMemory):
            check_capacity(request, engine, capacity(2 * features * 16 + 29))


def test_a_micro_batch_has_no_more_tokens_than_there_are():
    assert largest_micro_batch(sft_request(batch_tokens=64)) == 3
    assert largest_micro_batch(grpo_request(batch_tokens=64)) == 10
    assert largest_micro_batch(grpo_request(batch_tokens=8)) == 8
    assert largest_micro_batch(opd_request(batch_tokens=64)) == (3 + 4) + (1 + 4)


def test_what_is_not_known_refuses_nothing():
    check_capacity(sft_request(), ENGINE, None)
    check_capacity(sft_request(), None, capacity(0))
    with pytest.raises(JobExceedsMemory):
        check_capacity(sft_request(), engine_pb2.EngineInfo(base_model=common_pb2.BaseModel()), capacity(0))


def test_a_containers_limit_counts_where_it_is_the_smaller(tmp_path):
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    assert host_bytes(meminfo, cgroup) is None
    meminfo.write_text("MemTotal:  100 kB\nMemAvailable:   50 kB\n")
    assert host_bytes(meminfo, cgroup) == 50 * 1024
    cgroup.mkdir()
    (cgroup / "memory.current").write_text("1000\n")
    for limit, expected in (("max", 50 * 1024), ("9000", 8000), ("500", 0), ("99999999", 50 * 1024)):
        (cgroup / "memory.max").write_text(f"{limit}\n")
        assert host_bytes(meminfo, cgroup) == expected
