"""Engines of other models are found by the settings' addresses and on Redis, never by a request's word."""

import pytest

from kiln_common.bus.connect import connect_async
from kiln_common.bus.engine_presence import EngineWord, say
from kiln_common.errors import KilnError
from kiln_trainer.recipes.opd_options import TeacherModel
from kiln_trainer.teachers import TeacherDirectory
from tests.support.fake_engine import running_engine
from tests.support.redis_server import private_redis

SETTINGS = {"info_timeout_s": 10.0, "rollout_timeout_s": 10.0, "patience_s": 0.5}


async def code_of(call) -> str:
    with pytest.raises(KilnError) as caught:
        await call
    return caught.value.code


async def test_a_teacher_is_found_where_the_settings_say(tmp_path):
    async with running_engine("boot_1") as own, running_engine("boot_2") as big:
        big.base_model.model_id, big.base_model.model_hash = "big", "bb"
        directory = TeacherDirectory([own.address, big.address], **SETTINGS)
        assert (await directory.find(TeacherModel("big"))).model_hash == "bb"
        assert (await directory.find(TeacherModel("big", "bb"))).model_id == "big"
        assert await code_of(directory.find(TeacherModel("nobody"))) == "teacher_not_found"
        # Accepted with other weights, or with weights that were there then.
        assert await code_of(directory.find(TeacherModel("big", "old"))) == "teacher_changed"
        assert await code_of(directory.find(TeacherModel("nobody", "bb"))) == "teacher_unavailable"
        assert await code_of(directory.generate(TeacherModel("big", "old"), [])) == "teacher_changed"
        await directory.close()


async def test_an_engine_that_does_not_answer_may_be_the_teachers(tmp_path):
    directory = TeacherDirectory([f"unix:{tmp_path}/gone.sock"], **SETTINGS)
    assert await code_of(directory.find(TeacherModel("big"))) == "teacher_unavailable"
    await directory.close()


async def test_a_teacher_is_found_on_redis(tmp_path):
    with private_redis(tmp_path) as server:
        redis = connect_async(server.url, timeout_s=1.0)
        async with running_engine("boot_2") as big:
            big.base_model.model_id, big.base_model.model_hash = "big", "bb"
            directory = TeacherDirectory([], redis=redis, **SETTINGS)
            assert await code_of(directory.find(TeacherModel("big"))) == "teacher_not_found"
            await say(redis, EngineWord(big.address, "boot_2", "bb", 16, 0, 0))
            assert (await directory.find(TeacherModel("big"))).model_hash == "bb"
            await say(redis, EngineWord(big.address, "boot_2", "bb", 16, 0, 0, is_draining=True))
            assert await code_of(directory.find(TeacherModel("big"))) == "teacher_not_found"
            await directory.close()
        await redis.aclose()
