"""Named lists of destinations, for ``[egress] presets``. Each entry is written as in ``allow``.

``public_only`` is not a list: it allows every name, as long as its addresses are public.
"""

from __future__ import annotations

from collections.abc import Mapping

PUBLIC_ONLY = "public_only"

PRESETS: Mapping[str, tuple[str, ...]] = {
    "llm_apis": (
        "api.openai.com",
        "api.anthropic.com",
        "generativelanguage.googleapis.com",
        "*.openai.azure.com",
        "*.services.ai.azure.com",
        "api.mistral.ai",
        "api.cohere.com",
        "api.deepseek.com",
        "api.groq.com",
        "api.x.ai",
        "api.together.xyz",
        "api.fireworks.ai",
        "api.perplexity.ai",
        "openrouter.ai",
    ),
    "registries": (
        "pypi.org",
        "files.pythonhosted.org",
        "registry.npmjs.org",
        "registry.yarnpkg.com",
        "crates.io",
        "index.crates.io",
        "static.crates.io",
        "proxy.golang.org",
        "sum.golang.org",
        "rubygems.org",
        "index.rubygems.org",
        "repo.maven.apache.org",
        "repo1.maven.org",
        "deb.debian.org",
        "security.debian.org",
        "archive.ubuntu.com",
        "security.ubuntu.com",
        "dl-cdn.alpinelinux.org",
        "registry-1.docker.io",
        "auth.docker.io",
        "production.cloudflare.docker.com",
        "ghcr.io",
        "pkg-containers.githubusercontent.com",
        "quay.io",
    ),
    "git_hosts": (
        "github.com",
        "api.github.com",
        "codeload.github.com",
        "objects.githubusercontent.com",
        "raw.githubusercontent.com",
        "gitlab.com",
        "bitbucket.org",
        "codeberg.org",
    ),
}
