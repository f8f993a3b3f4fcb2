"""The Lua scripts that change jobs: each is one atomic transaction, and each is safe to repeat.

A job's hash has a `status`; "succeeded", "failed" and "cancelled" are final and no script changes
them. Scripts about a running job carry the claim epoch they belong to and answer "lost" when a
later claim exists.

The queue is a sorted set in the order in which jobs run: by priority, then by turn, then by
acceptance. Each key's jobs of one priority take consecutive turns, the first of them the one after the
turn that was served last, so that keys alternate however many jobs one of them has queued (start-time
fair queueing, Goyal et al. 1996). A score holds all three: priority * 2^48 + turn * 2^16 + order.

Corrections that a job learns from are reserved for it in the transaction that accepts it, and free again
or used up in the one that ends it.

An adapter name's open jobs stand in a list, in order of acceptance. Only the first may run: a trainer
passes over the others.
"""

from __future__ import annotations

from kiln_common.bus import keys

_COMMON = f"""
local final = {{succeeded = true, failed = true, cancelled = true}}
local priority_unit, turn_unit = 2^48, 2^16
local function add_event(events, type, data, at_s)
  redis.call('XADD', events, 'MAXLEN', '~', 20000, '*', 'type', type, 'data', data, 'at_s', at_s)
end
local function server_time_s()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end
local function wake_a_trainer()
  redis.call('LPUSH', '{keys.JOB_WAKE}', 1)
  redis.call('LTRIM', '{keys.JOB_WAKE}', 0, 63)
end
local function job_key(id) return (string.gsub('{keys.job("@")}', '@', id)) end
local function events_key(id) return (string.gsub('{keys.job_events("@")}', '@', id)) end
local function correction_key(id) return '{keys.correction("")}' .. id end
local function owner_queue(priority, owner)
  return '{keys.owner_queue("", "").removesuffix(":")}' .. priority .. ':' .. owner
end
"""

# KEYS idempotency, job, payload, events, index, adapter list, queued, sequence, turns
# ARGV job_id, has_key, now_s, payload, event data, priority, owner, correction ids joined by ",", whether
# all of them must be free, then the job's fields (name, value)...
SUBMIT = f"""{_COMMON}
local job_id, priority = ARGV[1], tonumber(ARGV[6])
local fields = {{}}
for i = 10, #ARGV do fields[#fields + 1] = ARGV[i] end
local payload_sha256
for i = 1, #fields, 2 do
  if fields[i] == 'payload_sha256' then payload_sha256 = fields[i + 1] end
end
if ARGV[2] == '1' then
  local known = redis.call('HMGET', KEYS[1], 'job_id', 'payload_sha256')
  -- A key whose job has expired is free again.
  if known[1] and redis.call('EXISTS', job_key(known[1])) == 1 then
    if known[2] ~= payload_sha256 then return {{'conflict', known[1]}} end
    return {{'exists', known[1]}}
  end
end
if redis.call('EXISTS', KEYS[2]) == 1 then return {{'exists', job_id}} end
local reserved = {{}}
for id in string.gmatch(ARGV[8], '[^,]+') do
  local found = redis.call('HMGET', correction_key(id), 'owner', 'reserved_by', 'used_by')
  if found[1] and not found[2] and not found[3] then
    reserved[#reserved + 1] = id
  elseif ARGV[9] == '1' then
    return {{'taken', id}}
  end
end
for _, id in ipairs(reserved) do redis.call('HSET', correction_key(id), 'reserved_by', job_id) end
if ARGV[2] == '1' then
  redis.call('HSET', KEYS[1], 'job_id', job_id, 'payload_sha256', payload_sha256)
end
local own = owner_queue(ARGV[6], ARGV[7])
local turn = tonumber(redis.call('HGET', KEYS[9], ARGV[6]) or 0)
local last = redis.call('ZREVRANGE', own, 0, 0, 'WITHSCORES')[2]
if last then turn = math.max(turn, math.floor((tonumber(last) - priority * priority_unit) / turn_unit)) end
local order = redis.call('INCR', KEYS[8]) % turn_unit
local place = string.format('%.0f', priority * priority_unit + (turn + 1) * turn_unit + order)
redis.call('SET', KEYS[3], ARGV[4])
redis.call('ZADD', KEYS[5], ARGV[3], job_id)
redis.call('RPUSH', KEYS[6], job_id)
redis.call('ZADD', KEYS[7], place, job_id)
redis.call('ZADD', own, place, job_id)
redis.call('HSET', KEYS[2], 'status', 'queued', 'created_at_s', ARGV[3], 'claim_epoch', 0, 'num_crashes', 0,
           'priority', ARGV[6], 'owner', ARGV[7], 'corrections', table.concat(reserved, ','), unpack(fields))
add_event(KEYS[4], 'queued', ARGV[5], ARGV[3])
wake_a_trainer()
return {{'accepted', job_id}}
"""

# KEYS running, queued, turns
# ARGV claim_timeout_s, trainer_id, now_s
CLAIM = f"""{_COMMON}
local function of_a_silent_trainer()
  local before = server_time_s() - tonumber(ARGV[1])
  return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', before, 'LIMIT', 0, 1)[1]
end
local function first_that_may_run()
  for start = 0, redis.call('ZCARD', KEYS[2]), 100 do
    for _, id in ipairs(redis.call('ZRANGE', KEYS[2], start, start + 99)) do
      local adapter = redis.call('HGET', job_key(id), 'adapter')
      if redis.call('LINDEX', '{keys.adapter_jobs("")}' .. adapter, 0) == id then return id end
    end
  end
end
local job_id = of_a_silent_trainer() or first_that_may_run()
if not job_id then return {{'none'}} end
local job = job_key(job_id)
local found = redis.call('HMGET', job, 'status', 'released', 'priority', 'owner')
found[3], found[4] = found[3] or '0', found[4] or ''  -- of a job that an earlier Kiln accepted
if found[1] == 'queued' then
  local place = tonumber(redis.call('ZSCORE', KEYS[2], job_id)) - tonumber(found[3]) * priority_unit
  local turn = math.max(math.floor(place / turn_unit), tonumber(redis.call('HGET', KEYS[3], found[3]) or 0))
  redis.call('HSET', KEYS[3], found[3], string.format('%.0f', turn))
  redis.call('HSET', job, 'status', 'running', 'started_at_s', ARGV[3])
  redis.call('ZREM', KEYS[2], job_id)
  redis.call('ZREM', owner_queue(found[3], found[4]), job_id)
elseif found[2] then
  redis.call('HDEL', job, 'released')
else
  redis.call('HINCRBY', job, 'num_crashes', 1)
end
local epoch = redis.call('HINCRBY', job, 'claim_epoch', 1)
redis.call('HSET', job, 'trainer_id', ARGV[2], 'write_number', 0)
redis.call('ZADD', KEYS[1], server_time_s(), job_id)
add_event(events_key(job_id), 'claimed', cjson.encode({{claim_epoch = epoch, trainer_id = ARGV[2]}}), ARGV[3])
local read = redis.call('HMGET', job, 'adapter', 'num_crashes', 'cancel_requested', 'resolved_base',
                        'published')
return {{'claimed', job_id, epoch, unpack(read)}}
"""

# KEYS job, running
# ARGV claim_epoch, job_id
HEARTBEAT = f"""{_COMMON}
local found = redis.call('HMGET', KEYS[1], 'status', 'claim_epoch', 'cancel_requested')
if found[1] ~= 'running' or found[2] ~= ARGV[1] then return {{'lost'}} end
redis.call('ZADD', KEYS[2], server_time_s(), ARGV[2])
return {{'ok', found[3] or ''}}
"""

# KEYS job, events
# ARGV claim_epoch, write_number, num_fields, (name, value)..., (type, data, at_s)...
WRITE = f"""{_COMMON}
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
# once, a running one is asked to (and to "keep" or "discard" what it has published), one that publishes
# its result goes on.
# KEYS job, events, running, adapter list, queued, payload, idempotency
# ARGV claim_epoch, job_id, status, now_s, retention_s, event data, cancel, whether the job's corrections
# are used up, (name, value)...
FINISH = f"""{_COMMON}
local found = redis.call('HMGET', KEYS[1], 'status', 'claim_epoch', 'is_publishing', 'priority', 'owner',
                         'corrections')
if not found[1] then return {{'gone'}} end
if final[found[1]] then return {{'final', found[1], found[2]}} end
if ARGV[1] == '' then
  if found[1] ~= 'queued' then
    if found[3] then return {{'too_late'}} end
    redis.call('HSET', KEYS[1], 'cancel_requested', ARGV[7])
    return {{'requested'}}
  end
elseif found[1] ~= 'running' or found[2] ~= ARGV[1] then
  return {{'lost'}}
end
redis.call('HSET', KEYS[1], 'status', ARGV[3], 'finished_at_s', ARGV[4])
for i = 9, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
add_event(KEYS[2], ARGV[3], ARGV[6], ARGV[4])
redis.call('ZREM', KEYS[3], ARGV[2])
local place = redis.call('ZSCORE', KEYS[5], ARGV[2])
if place then
  -- The key's later jobs move up by one place each.
  local own = owner_queue(found[4] or '0', found[5] or '')
  local later = redis.call('ZRANGEBYSCORE', own, '(' .. place, '+inf', 'WITHSCORES')
  redis.call('ZREM', KEYS[5], ARGV[2])
  redis.call('ZREM', own, ARGV[2])
  for i = 1, #later, 2 do
    redis.call('ZADD', KEYS[5], place, later[i])
    redis.call('ZADD', own, place, later[i])
    place = later[i + 1]
  end
end
for id in string.gmatch(found[6] or '', '[^,]+') do
  local correction = correction_key(id)
  if redis.call('HGET', correction, 'reserved_by') == ARGV[2] then
    redis.call('HDEL', correction, 'reserved_by')
    if ARGV[8] == '1' then redis.call('HSET', correction, 'used_by', ARGV[2]) end
  end
end
if (redis.call('HGET', KEYS[1], 'webhook') or '') ~= '' then
  redis.call('ZADD', '{keys.WEBHOOKS}', ARGV[4], ARGV[2])
end
redis.call('LREM', KEYS[4], 0, ARGV[2])
if redis.call('LLEN', KEYS[4]) > 0 then wake_a_trainer() end
for _, key in ipairs({{KEYS[1], KEYS[2], KEYS[6], KEYS[7]}}) do redis.call('EXPIRE', key, ARGV[5]) end
return {{'done'}}
"""

# Gives a claim back without blame: the next trainer to look takes the job at once.
# KEYS job, running
# ARGV claim_epoch, job_id
RELEASE = f"""{_COMMON}
local found = redis.call('HMGET', KEYS[1], 'status', 'claim_epoch')
if found[1] ~= 'running' or found[2] ~= ARGV[1] then return {{'lost'}} end
redis.call('HSET', KEYS[1], 'released', 1)
redis.call('ZADD', KEYS[2], 0, ARGV[2])
wake_a_trainer()
return {{'ok'}}
"""
