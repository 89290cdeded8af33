"""Jobs over files of requests: any size of input, every answer written, and resumable after whatever happens."""
