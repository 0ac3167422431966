-- Gives errors of the gateway the shape of the OpenAI API. Listed BEFORE the transcoder in http_filters: it sees requests
-- before and replies after it. Native gRPC and gRPC-Web calls pass untouched.
local TYPE = {
  ["400"] = "invalid_request_error", ["401"] = "invalid_request_error", ["403"] = "permission_error",
  ["404"] = "invalid_request_error", ["409"] = "invalid_request_error", ["413"] = "invalid_request_error",
  ["422"] = "invalid_request_error", ["429"] = "rate_limit_error", ["499"] = "invalid_request_error",
}

-- gRPC's own headers mean nothing to a REST client.
local PRIVATE = {
  "grpc-status", "grpc-message", "grpc-status-details-bin", "grpc-accept-encoding", "x-openai-error",
}
local NAMESPACE = "caravan"

-- A reply cannot tell who asked: the transcoder leaves application/grpc on the error of a unary call whose details it
-- cannot print.
function envoy_on_request(handle)
  if string.find(handle:headers():get("content-type") or "", "^application/grpc") then
    handle:streamInfo():dynamicMetadata():set(NAMESPACE, "grpc", true)
  end
end

local function put(handle, json)
  handle:body(true):setBytes(json)
  local headers = handle:headers() -- taken again: body() yields, and the old handle is stale then
  headers:replace("content-type", "application/json")
  headers:replace("content-length", tostring(#json))
end

local function quoted(message)
  local text = string.gsub(message, "%%(%x%x)", function(hex) return string.char(tonumber(hex, 16)) end)
  return string.gsub(text, '[%z\1-\31"\\]', function(char) return string.format("\\u%04x", string.byte(char)) end)
end

function envoy_on_response(handle)
  local marks = handle:streamInfo():dynamicMetadata():get(NAMESPACE)
  if marks and marks["grpc"] then return end
  local headers = handle:headers()
  local exact = headers:get("x-openai-error")
  local bare = headers:get("grpc-message")
  local failed = (headers:get("grpc-status") or "0") ~= "0"
  for _, name in ipairs(PRIVATE) do headers:remove(name) end
  local status = headers:get(":status")
  if not status or status < "400" then return end

  -- The gateway's own words: services/runtime/errors.py, trailing_metadata.
  if exact then
    put(handle, exact)
    return
  end

  -- A bare status, such as gRPC's own answer when the gateway is overwhelmed: {"code":N,"message":"<escaped>",...}.
  local body = handle:body(true)
  local text = body:getBytes(0, body:length())
  local message = string.match(text, '^{"code":%d+,"message":"(.*)","details"')
    or string.match(text, '^{"code":%d+,"message":"(.*)"}$')
  if not message and (failed or string.find(text, '^{"code":%d+')) then message = quoted(bare or "") end
  if message then
    put(handle, '{"error":{"message":"' .. message .. '","type":"' .. (TYPE[status] or "server_error")
      .. '","param":null,"code":null}}')
  end
end
