"Package metadata. Everything is read from settings.ini, so a name, version or requirement is written once."

import json
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

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


class build_with_notebooks(build_py):
    """Builds the package with the notebooks in it, without their outputs, and with the
    tables that they read: `grpo_nb notebooks DIR` lays them out."""

    def run(self):
        super().run()
        if self.editable_mode:  # they are beside the package
            return
        target = Path(self.build_lib) / lib / "notebooks"
        shutil.rmtree(target, ignore_errors=True)
        for path in self.notebooks():
            copy = target / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".ipynb":
                copy.write_text(without_outputs(path), encoding="utf-8")
            else:
                shutil.copy(path, copy)

    def notebooks(self):
        "Notebooks and tables of the repository; none of JupyterLab's own copies."
        patterns = ["nbs/**/*.ipynb", "benchmarks/claims/*", "benchmarks/results/*"]
        found = [path for pattern in patterns for path in root.glob(pattern)]
        return [path for path in found if ".ipynb_checkpoints" not in path.parts]


def without_outputs(path):
    "A notebook as text, not run."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


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
    cmdclass={"build_py": build_with_notebooks},
    zip_safe=False,
)
