"Package metadata. Everything is read from settings.ini, so a name, version or requirement is written once."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters="=")
root = Path(__file__).resolve().parent
config.read(root / "settings.ini", encoding="utf-8")
readme = root / "README.md"
settings = config["DEFAULT"]

name, lib = settings["lib_name"], settings["lib_path"]
extras = {
    key.removeprefix("extras_"): value.split()
    for key, value in settings.items()
    if key.startswith("extras_")
}
statuses = [
    "",
    "1 - Planning",
    "2 - Pre-Alpha",
    "3 - Alpha",
    "4 - Beta",
    "5 - Production/Stable",
    "6 - Mature",
    "7 - Inactive",
]

setup(
    name=name,
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8")
    if readme.exists()
    else settings["description"],
    long_description_content_type="text/markdown",
    license={"apache2": "Apache-2.0"}[settings["license"]],
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    project_urls={"Documentation": settings["doc_host"] + settings["doc_baseurl"]},
    keywords=settings["keywords"].split(),
    classifiers=[
        f"Development Status :: {statuses[int(settings['status'])]}",
        f"Intended Audience :: {settings['audience']}",
        f"Natural Language :: {settings['language']}",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    packages=find_packages(include=[lib, f"{lib}.*"]),
    include_package_data=False,  # just these:
    package_data={
        lib: [
            f"models/**/*.{suffix}"
            for suffix in ("safetensors", "json", "jinja", "txt", "md")
        ]
    },
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        # how nbdev finds the names that become links in the documentation
        "nbdev": [f"{lib}={lib}._modidx:d"],
    },
    zip_safe=False,
)
