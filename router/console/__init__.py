"""The console: a page at / that shows the cluster, and the JSON under /admin/v1 that it reads. It is in no request's way."""
