"""The Lua scripts that change jobs: each is one atomic transaction, and each is safe to repeat.

A job's hash has a `status`; "succeeded", "failed" and "cancelled" are final and no script changes
them. Scripts about a running job carry the claim epoch they belong to and answer "lost" when a
later claim exists.

An adapter name's open jobs stand in a list, in order of acceptance. Only the first may run: one
that a trainer is handed too early is taken off the queue and marked `deferred`, and comes back when
the one before it ends.
"""

from __future__ import annotations

from kiln_common.bus import keys

_FINAL = """
local final = {succeeded = true, failed = true, cancelled = true}
local function add_event(events, type, data, at_s)
  redis.call('XADD', events, 'MAXLEN', '~', 20000, '*', 'type', type, 'data', data, 'at_s', at_s)
end
"""

# KEYS idempotency, job, payload, events, index, queue, adapter list, queued, sequence
# ARGV job_id, has_key, now_s, payload, event data, then the job's fields (name, value)...
SUBMIT = f"""{_FINAL}
local fields = {{}}
for i = 6, #ARGV do fields[#fields + 1] = ARGV[i] end
local payload_sha256, adapter
for i = 1, #fields, 2 do
  if fields[i] == 'payload_sha256' then payload_sha256 = fields[i + 1] end
  if fields[i] == 'adapter' then adapter = fields[i + 1] end
end
if ARGV[2] == '1' then
  local known = redis.call('HMGET', KEYS[1], 'job_id', 'payload_sha256')
  -- A key whose job has expired is free again.
  if known[1] and redis.call('EXISTS', (string.gsub('{keys.job("@")}', '@', known[1]))) == 1 then
    if known[2] ~= payload_sha256 then return {{'conflict', known[1]}} end
    return {{'exists', known[1]}}
  end
  redis.call('HSET', KEYS[1], 'job_id', ARGV[1], 'payload_sha256', payload_sha256)
end
if redis.call('EXISTS', KEYS[2]) == 1 then return {{'exists', ARGV[1]}} end
redis.call('SET', KEYS[3], ARGV[4])
redis.call('ZADD', KEYS[5], ARGV[3], ARGV[1])
redis.call('RPUSH', KEYS[7], ARGV[1])
redis.call('ZADD', KEYS[8], redis.call('INCR', KEYS[9]), ARGV[1])
local entry = redis.call('XADD', KEYS[6], '*', 'job_id', ARGV[1], 'adapter', adapter)
redis.call('HSET', KEYS[2], 'status', 'queued', 'created_at_s', ARGV[3], 'entry_id', entry,
           'claim_epoch', 0, 'num_crashes', 0, unpack(fields))
add_event(KEYS[4], 'queued', ARGV[5], ARGV[3])
return {{'accepted', ARGV[1]}}
"""

# KEYS job, queue, adapter list, queued, events
# ARGV job_id, entry_id, group, trainer_id, now_s
CLAIM = f"""{_FINAL}
local found = redis.call('HMGET', KEYS[1], 'status', 'entry_id', 'released')
local function drop()
  redis.call('XACK', KEYS[2], ARGV[3], ARGV[2])
  redis.call('XDEL', KEYS[2], ARGV[2])
end
if not found[1] or final[found[1]] or found[2] ~= ARGV[2] then
  drop()
  return {{'gone'}}
end
if redis.call('LINDEX', KEYS[3], 0) ~= ARGV[1] then
  drop()
  redis.call('HSET', KEYS[1], 'deferred', 1, 'entry_id', '')
  return {{'deferred'}}
end
if found[1] == 'queued' then
  redis.call('HSET', KEYS[1], 'status', 'running', 'started_at_s', ARGV[5])
  redis.call('ZREM', KEYS[4], ARGV[1])
elseif found[3] then
  redis.call('HDEL', KEYS[1], 'released')
else
  redis.call('HINCRBY', KEYS[1], 'num_crashes', 1)
end
local epoch = redis.call('HINCRBY', KEYS[1], 'claim_epoch', 1)
redis.call('HSET', KEYS[1], 'trainer_id', ARGV[4], 'write_number', 0)
redis.call('XCLAIM', KEYS[2], ARGV[3], ARGV[4], 0, ARGV[2], 'JUSTID')
add_event(KEYS[5], 'claimed', cjson.encode({{claim_epoch = epoch, trainer_id = ARGV[4]}}), ARGV[5])
return {{'claimed', epoch}}
"""

# KEYS job, queue
# ARGV claim_epoch, group, trainer_id, entry_id
HEARTBEAT = """
local found = redis.call('HMGET', KEYS[1], 'status', 'claim_epoch', 'cancel_requested')
if found[1] ~= 'running' or found[2] ~= ARGV[1] then return {'lost'} end
redis.call('XCLAIM', KEYS[2], ARGV[2], ARGV[3], 0, ARGV[4], 'JUSTID')
return {'ok', found[3] or ''}
"""

# KEYS job, events
# ARGV claim_epoch, write_number, num_fields, (name, value)..., (type, data, at_s)...
WRITE = f"""{_FINAL}
local found = redis.call('HMGET', KEYS[1], 'status', 'claim_epoch', 'write_number', 'cancel_requested')
if found[1] ~= 'running' or found[2] ~= ARGV[1] then return {{'lost'}} end
if tonumber(ARGV[2]) > tonumber(found[3]) then
  redis.call('HSET', KEYS[1], 'write_number', ARGV[2])
  local last_field = 3 + 2 * tonumber(ARGV[3])
  for i = 4, last_field, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
  for i = last_field + 1, #ARGV, 3 do add_event(KEYS[2], ARGV[i], ARGV[i + 1], ARGV[i + 2]) end
end
return {{'ok', found[4] or ''}}
"""

# Ends a job. With an empty claim_epoch it is a cancellation from outside: a queued job ends at
# once, a running one is asked to, one that publishes goes on.
# KEYS job, events, queue, adapter list, queued, payload, idempotency
# ARGV claim_epoch, job_id, status, now_s, group, retention_s, event data, (name, value)...
FINISH = f"""{_FINAL}
local found = redis.call('HMGET', KEYS[1], 'status', 'claim_epoch', 'entry_id', 'is_publishing')
if not found[1] then return {{'gone'}} end
if final[found[1]] then return {{'final', found[1], found[2]}} end
if ARGV[1] == '' then
  if found[1] ~= 'queued' then
    if found[4] then return {{'too_late'}} end
    redis.call('HSET', KEYS[1], 'cancel_requested', 1)
    return {{'requested'}}
  end
elseif found[1] ~= 'running' or found[2] ~= ARGV[1] then
  return {{'lost'}}
end
redis.call('HSET', KEYS[1], 'status', ARGV[3], 'finished_at_s', ARGV[4])
for i = 8, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
add_event(KEYS[2], ARGV[3], ARGV[7], ARGV[4])
if found[3] and found[3] ~= '' then
  redis.call('XACK', KEYS[3], ARGV[5], found[3])
  redis.call('XDEL', KEYS[3], found[3])
end
redis.call('ZREM', KEYS[5], ARGV[2])
redis.call('LREM', KEYS[4], 0, ARGV[2])
local next_id = redis.call('LINDEX', KEYS[4], 0)
if next_id then
  local next_job = string.gsub('{keys.job("@")}', '@', next_id)
  if redis.call('HDEL', next_job, 'deferred') == 1 then
    local adapter = redis.call('HGET', next_job, 'adapter')
    local entry = redis.call('XADD', KEYS[3], '*', 'job_id', next_id, 'adapter', adapter)
    redis.call('HSET', next_job, 'entry_id', entry)
  end
end
for _, key in ipairs({{KEYS[1], KEYS[2], KEYS[6], KEYS[7]}}) do redis.call('EXPIRE', key, ARGV[6]) end
return {{'done'}}
"""

# Gives a claim back without blame: the next trainer to look takes the job at once.
# KEYS job, queue
# ARGV claim_epoch, group, trainer_id, entry_id
RELEASE = """
local found = redis.call('HMGET', KEYS[1], 'status', 'claim_epoch')
if found[1] ~= 'running' or found[2] ~= ARGV[1] then return {'lost'} end
redis.call('HSET', KEYS[1], 'released', 1)
redis.call('XCLAIM', KEYS[2], ARGV[2], ARGV[3], 0, ARGV[4], 'IDLE', 86400000, 'JUSTID')
return {'ok'}
"""
