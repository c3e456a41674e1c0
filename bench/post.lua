-- POST a body of as many bytes as the script's first argument says.
function init(args)
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/octet-stream"
  wrk.body = string.rep("\0", tonumber(args[1]))
end
