// Command go_verify opens a checkpoint with golang.org/x/mod/sumdb/note and checks proofs with sumdb/tlog, both
// unmodified. It reads one JSON job from standard input and exits with 0 only when everything verifies.
package main

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

type job struct {
	Dir     string   `json:"dir"`
	Note    []byte   `json:"note"`
	VKey    string   `json:"vkey"`
	Records []record `json:"records"`
	Trees   []tree   `json:"trees"`
}

type record struct {
	Index int64    `json:"index"`
	Entry []byte   `json:"entry"`
	Proof [][]byte `json:"proof"`
}

type tree struct {
	Size  int64    `json:"size"`
	Root  []byte   `json:"root"`
	Proof [][]byte `json:"proof"`
}

// tiles reads tiles where tlog-tiles puts them: as tlog does, without the tile height in the path.
type tiles struct{ dir string }

func (t tiles) Height() int { return 8 }

func (t tiles) ReadTiles(wanted []tlog.Tile) ([][]byte, error) {
	var data [][]byte
	for _, tile := range wanted {
		path := strings.Replace(tile.Path(), "tile/8/", "tile/", 1)
		content, err := os.ReadFile(filepath.Join(t.dir, path))
		if err != nil {
			return nil, err
		}
		data = append(data, content)
	}
	return data, nil
}

func (t tiles) SaveTiles([]tlog.Tile, [][]byte) {}

func hashes(raw [][]byte) []tlog.Hash {
	result := make([]tlog.Hash, 0, len(raw))
	for _, item := range raw {
		var hash tlog.Hash
		if copy(hash[:], item) != tlog.HashSize || len(item) != tlog.HashSize {
			panic("a hash has 32 bytes")
		}
		result = append(result, hash)
	}
	return result
}

func head(text string) (tlog.Tree, error) {
	lines := strings.Split(text, "\n")
	if len(lines) != 4 {
		return tlog.Tree{}, fmt.Errorf("%d lines", len(lines))
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil {
		return tlog.Tree{}, err
	}
	root, err := base64.StdEncoding.DecodeString(lines[2])
	if err != nil {
		return tlog.Tree{}, err
	}
	return tlog.Tree{N: size, Hash: hashes([][]byte{root})[0]}, nil
}

func check(j job) error {
	verifier, err := note.NewVerifier(j.VKey)
	if err != nil {
		return err
	}
	opened, err := note.Open(j.Note, note.VerifierList(verifier))
	if err != nil {
		return err
	}
	if len(opened.Sigs) != 1 || len(opened.UnverifiedSigs) != 1 {
		return fmt.Errorf("%d verified and %d unknown signatures", len(opened.Sigs), len(opened.UnverifiedSigs))
	}
	latest, err := head(opened.Text)
	if err != nil {
		return err
	}
	reader := tlog.TileHashReader(latest, tiles{j.Dir})
	for _, r := range j.Records {
		leaf := tlog.RecordHash(r.Entry)
		if err := tlog.CheckRecord(hashes(r.Proof), latest.N, latest.Hash, r.Index, leaf); err != nil {
			return fmt.Errorf("our inclusion proof of %d: %w", r.Index, err)
		}
		proof, err := tlog.ProveRecord(latest.N, r.Index, reader)
		if err != nil {
			return fmt.Errorf("inclusion of %d from our tiles: %w", r.Index, err)
		}
		if err := tlog.CheckRecord(proof, latest.N, latest.Hash, r.Index, leaf); err != nil {
			return fmt.Errorf("inclusion of %d from our tiles: %w", r.Index, err)
		}
	}
	for _, t := range j.Trees {
		root := hashes([][]byte{t.Root})[0]
		if err := tlog.CheckTree(hashes(t.Proof), latest.N, latest.Hash, t.Size, root); err != nil {
			return fmt.Errorf("our consistency proof from %d: %w", t.Size, err)
		}
		computed, err := tlog.TreeHash(t.Size, reader)
		if err != nil || computed != root {
			return fmt.Errorf("root at %d from our tiles: %v", t.Size, err)
		}
	}
	return nil
}

func main() {
	var j job
	if err := json.NewDecoder(os.Stdin).Decode(&j); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	if err := check(j); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("verified")
}
