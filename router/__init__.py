"""The front door: OpenAI HTTP and gRPC in, one stream per request to a decode worker out."""
