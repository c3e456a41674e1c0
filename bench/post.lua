-- Send what the script's arguments say: the method, the content type, and the file that holds the body.
function init(args)
  wrk.method = args[1]
  wrk.headers["Content-Type"] = args[2]
  local file = assert(io.open(args[3], "rb"))
  wrk.body = file:read("*a")
  file:close()
end
