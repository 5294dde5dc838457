"""The OpenAI-compatible server and the web page: FastAPI and uvicorn, of the extra `serve`."""
