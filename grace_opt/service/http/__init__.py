"""The service's HTTP side: API, pages, access, metrics."""
