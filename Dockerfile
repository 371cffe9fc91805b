# Serves judges on a CPU. It was written without a Docker to build it with.
#   docker build -t arena .
#   docker run --rm -p 8000:8000 -e ARENA_TOKEN=... -v "$PWD/runs:/judges/runs:ro" -v "$PWD/bases:/judges/bases:ro" arena demo
# The judges lie in runs/, and bases that are folders where their recipes look for them, below /judges.
FROM python:3.12-slim
RUN useradd --create-home arena
WORKDIR /package
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY arena arena
RUN pip install --no-cache-dir --constraint constraints.txt '.[serve,gguf]'
USER arena
WORKDIR /judges
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://localhost:8000/ready')"]
ENTRYPOINT ["arena", "serve", "--host", "0.0.0.0"]
CMD ["demo"]
